// SPDX-License-Identifier: AGPL-3.0-or-later
// Every process of a VM's backup is killed at every call that Proxmox VE makes, and in mid-copy: what is listed
// restores bit for bit, nothing stays behind, the task log says why in one sentence, the next backup is right.
// FAULT_MATRIX=full runs every signal at every place.
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { isFull, MATRIX_TIMEOUT_MS, someOf } from "../support/fault/full-matrix.ts";
import { endProcess, expectFailure } from "../support/kill/kill-stage.ts";
import { stagePerTest } from "../support/kill/kill-vm-hooks.ts";
import { MECHANISMS } from "../support/kill/kill-vm-stage.ts";
import type { Program } from "../support/programs/scripted-pve.ts";
import { DISK, MIB } from "../support/vm/vm-rules.ts";

/** What Proxmox VE's programs have handlers for, which die. */
const ABORTS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"] as const;
/** KiB per second: a copy of some megabytes lasts until somebody ends it. */
const SLOW = 16;
/** The same, but a pause between two reads is short: only a read notices that its server is gone. */
const NOT_SO_SLOW = 512;
const CALLS = [
  "job_init",
  "backup_init",
  "backup_get_mechanism",
  "backup_vm_query_incremental",
  "backup_vm",
  "update_volume_attribute",
  "backup_cleanup",
  "backup_handle_log_file",
  "job_cleanup",
] as const;
type Call = (typeof CALLS)[number];
const isCommitted = (call: Call): boolean => CALLS.indexOf(call) >= CALLS.indexOf("backup_vm");

/** What the task log says of a QEMU that ended. */
const QEMU_GONE = {
  nbd: {
    "in mid-copy": /^Cannot back up "drive-scsi0": the QEMU process of VM 100 ended its NBD server .*qm status 100/,
    "before backup_vm": /^Cannot back up "drive-scsi0": the QEMU process of VM 100 ended/,
  },
  "file-handle": {
    // nbdfuse stands between, and where zeroes are is asked of QEMU itself: either may notice first.
    "in mid-copy":
      /^Cannot (?:read "drive-scsi0" through its file handle: |back up "drive-scsi0": the QEMU process of VM 100 ended)/,
    "before backup_vm": /^Cannot compare the dirty regions of "drive-scsi0" with QEMU's bitmap: Cannot connect/,
  },
};

describe.each(MECHANISMS)("by mechanism %s", (mechanism) => {
  const staged = stagePerTest({ mechanism });
  /** Most calls know nothing of the mechanism: by the second one, each meets fewer ends outside of the full matrix. */
  const isEvery = isFull || mechanism === "nbd";
  const everyOr = <const T>(chosen: readonly T[], all: readonly T[]): readonly T[] => (isEvery ? all : chosen);
  /** The mechanisms share the calls, except the one that copies. */
  const shareOf = (calls: readonly Call[], first: 0 | 1): readonly Call[] =>
    calls.filter((call, n) => isFull || call === "backup_vm" || (n % 2 === first) === (mechanism === "nbd"));
  const stepped = (): Promise<Program> => staged.stage.vzdump({ args: ["--step"] });
  const kill = (program: Program, signal: NodeJS.Signals): boolean => program.child.kill(signal);

  describe("a VM's backup of which vzdump is ended after a call", () => {
    it("knows every call there is", async () => {
      const { boundaries } = await staged.stage.killAt(await stepped());
      const asked = mechanism === "nbd" ? [] : ["before next_dirty_regions", "after next_dirty_regions"];
      expect(boundaries).toEqual(
        CALLS.flatMap((call) => [`before ${call}`, ...(call === "backup_vm" ? asked : []), `after ${call}`]),
      );
    });

    it("leaves nothing when it is killed with -9, and keeps what was complete", {
      timeout: MATRIX_TIMEOUT_MS,
    }, async () => {
      for (const call of shareOf(CALLS, 0)) {
        const program = await stepped();
        const { isListed, status } = await staged.stage.killAt(
          program,
          `after ${call}`,
          async () => void kill(program, "SIGKILL"),
        );
        expect([call, status, isListed]).toEqual([call, null, isCommitted(call)]);
        expect(await staged.stage.leftovers(), call).toEqual([]); // Node has seen the end of its input
        await staged.stage.expectNextIncremental(call);
      }
      await staged.stage.expectAllRight();
    });

    it("says that it was interrupted when a signal handler dies", { timeout: MATRIX_TIMEOUT_MS }, async () => {
      for (const [turn, call] of shareOf(CALLS, 1).entries()) {
        for (const signal of someOf(ABORTS, turn)) {
          const program = await stepped();
          const job = await staged.stage.killAt(program, `after ${call}`, async () => void kill(program, signal));
          expect([call, job.isListed]).toEqual([call, isCommitted(call)]);
          if (call === "update_volume_attribute") {
            // So it is in Proxmox VE: notes that cannot be set only warn, whatever the reason.
            expect([job.status, job.output]).toEqual([0, expect.stringMatching(/unable to add notes - interrupted/)]);
            await staged.stage.expectNextIncremental(call);
            continue;
          }
          expectFailure(job, /^interrupted by signal$/);
          const isToldKept = isCommitted(call) && CALLS.indexOf(call) <= CALLS.indexOf("backup_cleanup");
          if (isToldKept) expect(job.output).toMatch(/^WARN: .* was complete before the job failed and is kept/m);
          expect(await staged.stage.leftovers(), call).toEqual([]);
          await staged.stage.expectNextIncremental(call);
        }
      }
      await staged.stage.expectAllRight();
    });
  });

  describe("a VM's backup of which Node is ended before a call", () => {
    const ENDS = [
      ["SIGKILL", /^Cannot finish "(\w+)": the backup bridge is gone, it was ended by SIGKILL/],
      ["SIGTERM", /^Cannot finish "(\w+)": the backup bridge is gone, it was asked to end by SIGTERM$/],
    ] as const;

    it("fails with the call's name, and leaves nothing", { timeout: MATRIX_TIMEOUT_MS }, async () => {
      for (const [turn, call] of shareOf(CALLS.slice(1), 1).entries()) {
        for (const [signal, sentence] of someOf(ENDS, turn)) {
          const program = await stepped();
          const job = await staged.stage.killAt(program, `before ${call}`, async () => {
            await endProcess((await staged.stage.nodeOf(program)).pid, signal);
          });
          const cell = `${call} ${signal}`;
          expect([cell, job.isListed]).toEqual([cell, CALLS.indexOf(call) > CALLS.indexOf("backup_vm")]);
          if (call === "backup_handle_log_file") {
            expect([job.status, job.output]).toEqual([0, expect.stringMatching(/^WARN: cannot keep the log file: /m)]);
          } else {
            const named = sentence.exec(expectFailure(job, sentence))?.[1];
            // Notes are set by a Node of their own; the provider's is missed by the call after that.
            expect(named).toBe(call === "update_volume_attribute" ? "backup_cleanup" : call);
          }
          if (signal === "SIGTERM") expect(await staged.stage.leftovers(), cell).toEqual([]);
          await staged.stage.expectNextIncremental(cell);
        }
      }
      await staged.stage.expectAllRight();
    });
  });

  describe("a VM's backup of which vzdump is ended while Node has not yet read its request", () => {
    it("is not made for nobody, or is complete", { timeout: MATRIX_TIMEOUT_MS }, async () => {
      // Notes are set by a Node of their own, which does not stand still.
      const calls = isFull
        ? CALLS.slice(1).filter((call) => call !== "update_volume_attribute")
        : everyOr(["backup_vm"], ["backup_init", "backup_vm_query_incremental", "backup_vm"]);
      for (const [turn, call] of calls.entries()) {
        for (const signal of someOf(["SIGKILL", "SIGTERM"] as const, turn)) {
          const program = await stepped();
          let ended = Promise.resolve();
          const walked = staged.stage.walkTo(program, `before ${call}`, async () => {
            const { pid } = await staged.stage.nodeOf(program);
            process.kill(pid, "SIGSTOP");
            ended = sleep(150).then(async () => {
              kill(program, signal);
              await sleep(50);
              process.kill(pid, "SIGCONT");
            });
          });
          const job = await staged.stage.judge(await walked.finally(() => ended));
          if (signal === "SIGTERM") expectFailure(job, /^interrupted by signal$/);
          expect(await staged.stage.leftovers(), call).toEqual([]);
          await staged.stage.expectNextIncremental(call);
        }
      }
      await staged.stage.expectAllRight();
    });
  });

  describe("a VM's backup in mid-copy", () => {
    it("ends without a trace when vzdump is ended", { timeout: MATRIX_TIMEOUT_MS }, async () => {
      for (const signal of everyOr(["SIGKILL", "SIGTERM"], ["SIGKILL", ...ABORTS] as const)) {
        const job = await staged.stage.killInMidCopy((program) => void kill(program, signal), SLOW);
        if (signal !== "SIGKILL") expectFailure(job, /^interrupted by signal$/);
        expect(await staged.stage.leftovers(), signal).toEqual([]);
        await staged.stage.expectNextIncremental(signal);
      }
      await staged.stage.expectAllRight();
    });

    it.each([
      ["SIGTERM", /^Cancelled: the backup bridge got SIGTERM$/],
      ["SIGKILL", /^Cannot finish "backup_vm": the backup bridge is gone, it was ended by SIGKILL/],
    ] as const)("fails by Node's %s, and the next one sweeps", async (signal, sentence) => {
      const job = await staged.stage.killInMidCopy(async (program) => {
        await endProcess((await staged.stage.nodeOf(program)).pid, signal);
      }, SLOW);
      expectFailure(job, sentence);
      if (signal === "SIGTERM") expect(await staged.stage.leftovers()).toEqual([]);
      await staged.stage.expectNextIncremental(signal);
    });

    it.each(everyOr(["SIGKILL"], ["SIGKILL", "SIGTERM"]))(
      "fails when the guest's QEMU gets %s, and the next one is full",
      async (signal) => {
        const job = await staged.stage.killInMidCopy(
          () => void process.kill(staged.stage.guest.pid, signal),
          NOT_SO_SLOW,
        );
        expectFailure(job, QEMU_GONE[mechanism]["in mid-copy"]);
        expect(await staged.stage.leftovers()).toEqual([]);
        await staged.stage.guest.restart();
        expect(await staged.stage.next()).toBe("full: QEMU has no bitmap of it, or started a new one");
      },
    );
  });

  describe("a VM's backup of which the guest's QEMU is killed at a call", () => {
    it("fails before the copy and stands after it; the next one is full", { timeout: MATRIX_TIMEOUT_MS }, async () => {
      const places = [
        "before backup_vm_query_incremental",
        "before backup_vm",
        "after backup_vm",
        "before job_cleanup",
      ];
      for (const place of everyOr(["before backup_vm", "after backup_vm"], places)) {
        const job = await staged.stage.killAt(await stepped(), place, async () => await staged.stage.guest.kill());
        const isLate = place === "after backup_vm" || place === "before job_cleanup";
        expect([place, job.isListed, job.status]).toEqual([place, isLate, isLate ? 0 : 1]);
        if (place === "before backup_vm") expectFailure(job, QEMU_GONE[mechanism][place]);
        expect(await staged.stage.leftovers(), place).toEqual([]);
        await staged.stage.guest.restart();
        expect(await staged.stage.next(), place).toBe("full: QEMU has no bitmap of it, or started a new one");
      }
      await staged.stage.expectAllRight();
    });
  });
});

describe("a VM's backup through file handles", () => {
  const staged = stagePerTest({ mechanism: "file-handle", diskBytes: 80 * MIB });

  it.each(["SIGKILL", "SIGTERM"] as const)("fails when nbdfuse gets %s in mid-copy", async (signal) => {
    const job = await staged.stage.killInMidCopy(async (program) => {
      await endProcess((await staged.stage.findNamed(program, "nbdfuse")).pid, signal);
    }, NOT_SO_SLOW);
    expectFailure(
      job,
      /^Cannot read "drive-scsi0" through its file handle: the nbdfuse process behind it is gone \(E[A-Z]+\)$/,
    );
    expect(await staged.stage.leftovers()).toEqual([]);
    await staged.stage.expectNextIncremental(signal);
    await staged.stage.expectAllRight();
  });

  /** 32 MiB are given up at once, when as much is on the storage; up to 28 MiB may be on their way there. */
  const ENOUGH_TO_GIVE_UP = 72 * MIB;
  const PLACES = ["next_dirty_regions", "deallocate"].flatMap((asked) => [`before ${asked}`, `after ${asked}`]);
  const ENDS = [
    ["vzdump", "SIGKILL", undefined],
    ["Node", "SIGTERM", /^Cancelled: the backup bridge got SIGTERM$/],
    ["vzdump", "SIGTERM", /^interrupted by signal$/],
    ["Node", "SIGKILL", /^Cannot finish "backup_vm": the backup bridge is gone, it was ended by SIGKILL/],
  ] as const;

  it("leaves nothing whoever is ended while Node asks vzdump", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    for (const [turn, place] of PLACES.entries()) {
      for (const [who, signal, sentence] of someOf(ENDS, turn)) {
        const cell = `${place}, ${who} ${signal}`;
        await staged.stage.guest.write(DISK, 4 * MIB, seededBytes(cell, ENOUGH_TO_GIVE_UP));
        const program = await staged.stage.vzdump({ args: ["--step"] });
        const job = await staged.stage.killAt(program, place, async () => {
          if (who === "vzdump") program.child.kill(signal);
          else await endProcess((await staged.stage.nodeOf(program)).pid, signal);
        });
        expect([cell, job.isListed], job.output).toEqual([cell, false]);
        if (sentence === undefined) expect([cell, job.status]).toEqual([cell, null]);
        else expectFailure(job, sentence);
        if (`${who} ${signal}` !== "Node SIGKILL") expect(await staged.stage.leftovers(), cell).toEqual([]);
        await staged.stage.expectNextIncremental(cell); // which sweeps
      }
    }
    await staged.stage.expectAllRight();
  });
});
