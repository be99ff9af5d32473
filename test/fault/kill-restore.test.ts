// SPDX-License-Identifier: AGPL-3.0-or-later
// Every process of a restore is killed at every call that Proxmox VE makes, and while qemu-img reads: no server,
// mount, lock or folder stays (or the next restore sweeps it), the task log says why, and no restore passes for
// done that is not. FAULT_MATRIX=full runs every signal at every place.
import { mkdtemp } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { compareRaw } from "../../fixtures/lab/index.ts";
import type { Program } from "../support/container-node.ts";
import { ContainerStage } from "../support/kill-container-stage.ts";
import {
  descendantsOf,
  endProcess,
  eventually,
  expectFailure,
  isFull,
  MATRIX_TIMEOUT_MS,
  someOf,
  type Walk,
  walk,
} from "../support/kill-stage.ts";
import { stagePerTest } from "../support/kill-vm-hooks.ts";
import { DISK } from "../support/vm-rules.ts";

const VM_CALLS = [
  "restore_get_mechanism",
  "restore_vm_init",
  "archive_get_guest_config",
  "archive_get_firewall_config",
  "restore_vm_volume_init",
  "restore_vm_volume_cleanup",
  "restore_vm_cleanup",
] as const;
const CONTAINER_CALLS = [
  "archive_get_guest_config",
  "archive_get_firewall_config",
  "restore_get_mechanism",
  "restore_container_init",
  "restore_container_cleanup",
] as const;

describe("the restore of a VM", () => {
  const staged = stagePerTest({}, (stage) => stage.expectNextIncremental("setup"));

  const start = async (args: readonly string[] = ["--step"]): Promise<{ program: Program; target: string }> => {
    const target = await mkdtemp(path.join(staged.stage.node.dir, "target-"));
    return {
      program: await staged.stage.qmrestore([...staged.stage.points.keys()].at(-1) ?? "", target, args),
      target,
    };
  };

  /** A restore that nothing disturbs, which also sweeps. */
  async function mustRestore(cell: string): Promise<void> {
    const { program, target } = await start([]);
    const { output, status } = await program.result;
    expect([cell, status], output).toEqual([cell, 0]);
    await expectTarget(target);
    // A dead reader's locks wait for the next backup: nobody else may sweep in the store.
    expect(
      (await staged.stage.leftovers()).filter((name) => !/^qemu-\d+\.shared-/.test(name)),
      cell,
    ).toEqual([]);
  }

  async function expectTarget(target: string): Promise<void> {
    const oracle = [...staged.stage.points.values()].at(-1)?.get(DISK) ?? "no oracle";
    expect(await compareRaw(path.join(target, `${DISK}.raw`), oracle)).toMatchObject({ identical: true });
  }

  const kill = async (program: Program, place: string, act: () => Promise<void> | void): Promise<Walk> => {
    const walked = await staged.stage.walkTo(program, place, act);
    await staged.stage.expectNoSurvivors();
    return walked;
  };

  it("leaves nothing when qmrestore is ended after a call", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    const { boundaries } = await walk((await start()).program);
    expect(boundaries).toEqual(VM_CALLS.flatMap((call) => [`before ${call}`, `after ${call}`]));
    for (const [turn, call] of VM_CALLS.slice(0, -1).entries()) {
      for (const signal of someOf(["SIGKILL", "SIGTERM"] as const, turn)) {
        const { program } = await start();
        const walked = await kill(program, `after ${call}`, () => void program.child.kill(signal));
        if (signal === "SIGTERM" && call !== "restore_vm_volume_cleanup")
          expectFailure(walked, /^interrupted by signal$/);
        expect(await staged.stage.leftovers(), `${call} ${signal}`).toEqual([]);
      }
    }
    await mustRestore("the last");
  });

  it("fails with the call's name when Node is ended, and the next one sweeps", {
    timeout: MATRIX_TIMEOUT_MS,
  }, async () => {
    // SIGTERM first: what was killed with -9 leaves locks to the next backup.
    for (const [n, signal] of (["SIGTERM", "SIGKILL"] as const).entries()) {
      for (const call of VM_CALLS.slice(1).filter((_, turn) => isFull || turn % 2 === n)) {
        const { program, target } = await start();
        const walked = await kill(program, `before ${call}`, async () => {
          await endProcess((await staged.stage.nodeOf(program)).pid, signal);
        });
        if (call === "restore_vm_cleanup") {
          expect([walked.status, walked.output]).toEqual([
            0,
            expect.stringMatching(/cleanup after restore failed - C/),
          ]);
          await expectTarget(target);
        } else {
          expectFailure(walked, new RegExp(`^Cannot finish "${call}": the backup bridge is gone`));
        }
        if (signal === "SIGTERM") expect(await staged.stage.leftovers(), `${call} ${signal}`).toEqual([]);
        else await mustRestore(`${call} ${signal}`);
      }
    }
    await mustRestore("the last");
    await staged.stage.expectNextIncremental("the last");
  });

  it.each(["SIGKILL", "SIGTERM"] as const)(
    "does not pass for done when the disk's server gets %s while qemu-img reads",
    { timeout: MATRIX_TIMEOUT_MS },
    async (signal) => {
      const { program } = await start();
      let server = 0;
      const walked = kill(program, "after restore_vm_volume_init", async () => {
        const found = await descendantsOf(program.child.pid as number);
        server = found.find(({ name }) => name.startsWith("qemu-storage"))?.pid ?? 0;
        expect(server).toBeGreaterThan(0);
        process.kill(server, "SIGSTOP"); // whoever reads now waits
      });
      await eventually("a reader", async () =>
        (await descendantsOf(program.child.pid as number)).find(({ name }) => name === "qemu-img"),
      );
      process.kill(server, signal);
      if (signal !== "SIGKILL") process.kill(server, "SIGCONT"); // a stopped process takes no SIGTERM
      expectFailure(await walked, /has 0 bytes|failed|no file or block device/); // what the reader makes of it
      const reason = /Cannot vouch for the restored "drive-scsi0": it was not on offer to the end, .*; restore again/;
      expect((await walked).output).toMatch(reason);
      expect(await staged.stage.leftovers()).toEqual([]);
      await mustRestore(signal);
    },
  );
});

describe("the restore of a container", () => {
  it.each(["tar", "squashfs"])(
    "from %s leaves nothing whoever is ended",
    { timeout: MATRIX_TIMEOUT_MS },
    async (mode) => {
      await using stage = await ContainerStage.create({ "lxc-backup-mode": mode });
      for (const [turn, call] of CONTAINER_CALLS.entries()) {
        for (const victim of someOf(
          ["pct SIGKILL", "pct SIGTERM", "Node SIGKILL", "Node SIGTERM"],
          turn + (mode === "tar" ? 0 : 2),
        )) {
          const cell = `${call} ${victim}`;
          const target = path.join(stage.node.dir, `target-${call}-${victim.replace(" ", "-")}`);
          const program = await stage.node.restore(stage.newest, target, ["--step"]);
          const [who, signal] = victim.split(" ") as [string, NodeJS.Signals];
          const walked = await stage.walkTo(program, `after ${call}`, async () => {
            if (who === "pct") program.child.kill(signal);
            else await endProcess((await stage.nodeOf(program)).pid, signal);
          });
          await stage.expectNoSurvivors();
          if (victim === "pct SIGTERM" && call !== "restore_container_cleanup")
            expectFailure(walked, /^interrupted by signal$/);
          if (who === "Node" && call !== "restore_container_cleanup")
            expectFailure(walked, /the backup bridge is gone/);
          if (victim !== "Node SIGKILL") expect(await stage.leftovers(), cell).toEqual([]);
        }
      }
      await stage.expectRestores(); // and sweeps
      expect(await stage.leftovers()).toEqual([]);
      await stage.next("after all");
    },
  );
});
