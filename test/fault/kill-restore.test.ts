// SPDX-License-Identifier: AGPL-3.0-or-later
// Every process of a restore is killed at every call that Proxmox VE makes, and while qemu-img reads: no server,
// mount, lock or folder stays (or the next restore sweeps it), the task log says why, and no restore passes for
// done that is not. FAULT_MATRIX=full runs every signal at every place.
import { mkdtemp } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { compareRaw, seededBytes } from "../../fixtures/lab/index.ts";
import { isFull, MATRIX_TIMEOUT_MS, someOf } from "../support/fault/full-matrix.ts";
import { ContainerStage } from "../support/kill/kill-container-stage.ts";
import {
  endProcess,
  expectFailure,
  resume,
  type SeenProcess,
  type Walk,
  walk,
  withPrograms,
} from "../support/kill/kill-stage.ts";
import { stagePerTest } from "../support/kill/kill-vm-hooks.ts";
import type { Program } from "../support/programs/scripted-pve.ts";
import { DISK, MIB } from "../support/vm/vm-rules.ts";

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

/** What a restore reads, as the kernel names it. */
const ON_OFFER = /\/run\/pve-backup-host\/restore-/;

/** Ends a server that owes `reader` an answer. The reader goes on when the server is gone for certain. */
async function endBefore(reader: SeenProcess, server: number, signal: NodeJS.Signals, halted: number): Promise<void> {
  process.kill(reader.pid, "SIGSTOP");
  await endProcess(server, signal, halted);
  resume(reader.pid);
}

describe("the restore of a VM", () => {
  const staged = stagePerTest({}, (stage) => stage.expectNextIncremental("setup"));

  const start = async (
    args: readonly string[] = ["--step"],
    bundle = staged.bundle,
  ): Promise<{ program: Program; target: string }> => {
    const { stage } = staged;
    const target = await mkdtemp(path.join(stage.node.dir, "target-"));
    const program = await stage.qmrestore([...stage.points.keys()].at(-1) ?? "", target, args, bundle);
    return { program, target };
  };

  /** A restore that nothing disturbs, which also sweeps. */
  async function mustRestore(cell: string, bundle = staged.bundle): Promise<void> {
    const { program, target } = await start([], bundle);
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
    expect(boundaries).toEqual(
      VM_CALLS.flatMap((call) => [
        `before ${call}`,
        `after ${call}`,
        ...(call === "restore_vm_volume_init" ? ["before convert"] : []),
      ]),
    );
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

  /** Who is ended, and who stands still until then, from where on, so that qemu-img waits. */
  const SERVERS = [
    ["qemu-storage-daemon", "qemu-storage-daemon", "after restore_vm_volume_init"],
    ["qemu-storage-daemon", "qemu-storage-daemon", "before convert"],
    ["nbdfuse", "qemu-nbd", "before convert"],
    ["qemu-nbd", "qemu-nbd", "before convert"],
  ] as const;

  it.each(["SIGKILL", "SIGTERM"] as const)(
    "does not pass for done when the disk's server gets %s while qemu-img reads",
    { timeout: MATRIX_TIMEOUT_MS },
    async (signal) => {
      await using withoutFuse = await withPrograms(staged.bundle, {
        "qemu-storage-daemon": "echo \"Invalid parameter 'fuse'\" >&2; exit 1",
      });
      for (const [name, still, place] of SERVERS) {
        const cell = `${name} ${signal} ${place}`;
        const isDaemon = name === "qemu-storage-daemon";
        const bundle = isDaemon ? staged.bundle : withoutFuse;
        const { program } = await start(["--step"], bundle);
        const { stage } = staged;
        const { halted, walked: walking } = await stage.haltAt(program, place, still);
        const reader = isDaemon // A halted one does not even let the file be opened.
          ? await stage.findNamed(program, "qemu-img")
          : await stage.findInCall(program, "qemu-img", ON_OFFER);
        await endBefore(reader, (await stage.findNamed(program, name)).pid, signal, halted);
        const walked = await walking;
        await stage.expectNoSurvivors();
        expectFailure(walked, /has 0 bytes|failed|no file or block device|^Cannot verify/); // if the reader is content
        const reason = new RegExp(
          `Cannot verify the restored "drive-scsi0": it was not served to the end, (?:${name} .*|its file was unmounted); restore again`,
        );
        expect(walked.output, cell).toMatch(reason);
        expect(await stage.leftovers(), cell).toEqual([]);
        await mustRestore(cell, bundle);
      }
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
          if (who === "Node" && call !== "restore_container_cleanup") {
            expectFailure(walked, /the backup bridge is gone|^not a (?:directory|regular file)/); // Node took it away in order
            expect(walked.output, cell).toMatch(/the backup bridge is gone/);
          }
          if (victim !== "Node SIGKILL") expect(await stage.leftovers(), cell).toEqual([]);
          else await stage.next(cell); // a dead reader's lock waits for the next backup
        }
      }
      await stage.expectRestores(); // and sweeps
      expect(await stage.leftovers()).toEqual([]);
      await stage.next("after all");
    },
  );

  describe("from a squashfs image that the kernel cannot mount", () => {
    const WITHOUT_KERNEL = {
      mount: `[ "$2" = squashfs ] || exec /usr/bin/mount "$@"; echo "mount: unknown filesystem type 'squashfs'" >&2; exit 32`,
    };
    const NOT_TO_THE_END =
      /Cannot verify the restored "backup\/101\/lxc-\d+": it was not served to the end, (?:squashfuse_ll .*|it was unmounted); restore again/;
    const TAR = /^command 'tar cpf -' failed$/;
    /** Who may go on for a moment may even come to the end. */
    const TAR_OR_US = /^command 'tar cpf -' failed$|^Cannot (?:verify|finish)/;
    /** Of a mount without a server, what the kernel remembers may still say that it is a folder. */
    const BEFORE = [
      ["SIGKILL", /^not a directory|^command 'tar xpf - .*' failed$/],
      ["SIGTERM", /^not a directory|^command 'tar xpf - .*' failed$/],
    ] as const;
    const MEANWHILE = [
      ["squashfuse SIGKILL", TAR],
      ["squashfuse SIGTERM", TAR_OR_US],
      ["Node SIGKILL", TAR_OR_US],
      ["Node SIGTERM", TAR],
      ["pct SIGKILL", undefined],
      ["pct SIGTERM", /^interrupted by unexpected signal$/],
    ] as const;

    it("does not pass for done, whoever is ended", { timeout: MATRIX_TIMEOUT_MS }, async () => {
      const large = { "home/u/large": seededBytes("large", 6 * MIB) };
      await using stage = await ContainerStage.create({ "lxc-backup-mode": "squashfs" }, {}, large);
      await using bundle = await withPrograms({ path: stage.node.bundle }, WITHOUT_KERNEL);
      const start = (cell: string): Promise<Program> =>
        stage.node.restore(stage.newest, path.join(stage.node.dir, cell), ["--step"], bundle.path);

      for (const [signal, sentence] of BEFORE) {
        const program = await start(`before-${signal}`);
        const walked = await stage.walkTo(program, "after restore_container_init", async () => {
          await endProcess((await stage.findNamed(program, "squashfuse_ll")).pid, signal);
        });
        await stage.expectNoSurvivors();
        expectFailure(walked, sentence);
        expect(walked.output, signal).toMatch(NOT_TO_THE_END);
        expect(await stage.leftovers(), signal).toEqual([]);
      }

      for (const [victim, sentence] of MEANWHILE) {
        const program = await start(victim.replace(" ", "-"));
        const { halted, walked: walking } = await stage.haltAt(
          program,
          "before extract",
          "squashfuse_ll",
          () => stage.findInCall(program, "tar", /^pipe:/), // it has read what fits into a pipe that nobody empties
        );
        const reader = await stage.findInCall(program, "tar", ON_OFFER);
        const [who, signal] = victim.split(" ") as [string, NodeJS.Signals];
        if (who === "squashfuse") await endBefore(reader, halted, signal, halted);
        else if (who === "Node") await endProcess((await stage.nodeOf(program)).pid, signal, halted);
        else await endProcess(program.child.pid as number, signal, halted);
        const walked = await walking;
        await stage.expectNoSurvivors();
        if (sentence === undefined) expect([victim, walked.status]).toEqual([victim, null]);
        else expectFailure(walked, sentence);
        if (who === "squashfuse") expect(walked.output, victim).toMatch(NOT_TO_THE_END);
        if (victim !== "Node SIGKILL") expect(await stage.leftovers(), victim).toEqual([]);
        else await stage.next(victim); // a dead reader's lock waits for the next backup
      }
      await stage.expectRestores(bundle.path); // and sweeps
      expect(await stage.leftovers()).toEqual([]);
    });
  });
});
