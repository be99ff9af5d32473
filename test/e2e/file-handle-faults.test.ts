// SPDX-License-Identifier: AGPL-3.0-or-later
// Mechanism "file-handle" when something is wrong: a closure that lies, a file or a socket that goes away, a
// server that hangs. One clear sentence, nothing listed, nothing left behind, and the next backup is right.
import { rm } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { type LabBackup, type LabGuest, seededBytes, until } from "../../fixtures/lab/index.ts";
import type { HostError } from "../../src/core/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { HandedOver, handing } from "../support/vm/file-handles.ts";
import { backUp, type JobOptions, list } from "../support/vm/vm-job.ts";
import {
  DISK,
  DISK_BYTES,
  expectRestores,
  leftovers,
  MIB,
  modeOf,
  mustBackUp,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

const KIB = 1024;
/** Slow enough to be in mid-copy when something happens: the disk has 5 MiB of data and more. */
const SLOW = 2 * MIB;

/** A job that must fail; @returns its one sentence. Nothing new is listed, no staging folder or lock is left. */
async function failingJob(node: TestNode, guest: LabGuest, options: JobOptions): Promise<string> {
  const listed = await list(node, VMID);
  const { error } = await backUp(node, guest, options);
  const { code, message } = (error ?? {}) as HostError;
  expect(code, String(error)).toMatch(/^[A-Z_]+$/); // raised on purpose
  expect(message).toMatch(/^Cannot [^\n]+$/);
  expect(await list(node, VMID)).toEqual(listed);
  expect(await leftovers(node)).toEqual([]);
  return message;
}

describe("a closure that lies", () => {
  it("never passes for a full backup", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    for (const [epoch, regions, end] of [
      [1000, [], 0], // nbdinfo has failed
      [1001, [{ offset: 0, length: 4 * MIB }], 4 * MIB],
    ] as const) {
      expect(await failingJob(node, guest, { epoch, handOver: handing({ regions }) })).toBe(
        `Cannot verify the dirty regions of "${DISK}": PVE reports them without gap to byte ${end} only, ` +
          `a full backup needs all ${DISK_BYTES}`,
      );
    }
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 2000, handOver: handing() }));
  });

  it("never passes for an incremental backup", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver: handing() });
    for (const mib of [5, 13]) await guest.write(DISK, mib * MIB, seededBytes(mib, 128 * KIB));
    const [one, other] = [4, 12].map((mib) => ({ offset: mib * MIB, length: 4 * MIB }));
    if (one === undefined || other === undefined) throw new Error("two regions are two");
    const says = (range?: typeof one): string =>
      range === undefined ? "nothing more" : `${range.length} bytes at ${range.offset}`;
    for (const [epoch, regions, ours, theirs] of [
      [2000, [], one, undefined], // nbdinfo has failed
      [2001, [one], other, undefined], // nbdinfo has died in between
      [2002, [one, other, { offset: 20 * MIB, length: 512 }], undefined, { offset: 20 * MIB, length: 512 }],
    ] as const) {
      expect(await failingJob(node, guest, { epoch, handOver: handing({ regions }) })).toBe(
        `Cannot verify the dirty regions of "${DISK}": PVE reports ${says(theirs)}, QEMU's bitmap says ${says(ours)}`,
      );
    }
    const last = await mustBackUp(node, guest, { epoch: 3000, handOver: handing() });
    expect(modeOf(last.job)).toBe(`incremental since ${first.volname}`);
    await expectRestores(node, first, last);
  });
});

describe("an NBD socket that is not beside the file", () => {
  /** Without a socket the lab cannot close its exports in order, so it is put back before. */
  const withoutSocket = async (access: LabBackup): Promise<HandedOver> => {
    const handed = await HandedOver.open(access);
    const socket = access.volumes[DISK]?.["nbd-path"] ?? "";
    await rm(socket);
    return handed;
  };

  it("ends an incremental backup: the dirty regions cannot be verified", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver: handing() });
    await guest.write(DISK, 9 * MIB, seededBytes("second", 300 * KIB));
    const message = await failingJob(node, guest, { epoch: 2000, handOver: withoutSocket });
    expect(message).toMatch(/^Cannot compare the dirty regions of "drive-scsi0" with QEMU's bitmap: .*ENOENT/);
    const last = await mustBackUp(node, guest, { epoch: 3000, handOver: handing() });
    await expectRestores(node, first, last);
  });

  it("makes a full backup read everything, and say so", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver: withoutSocket });
    const text = first.job.log.join("\n");
    expect(text).toMatch(/^info: drive-scsi0: all of it is read, zeroes too: QEMU cannot be asked where they are \(/m);
    expect(text).toMatch(/100% of 24\.0 MiB in .* read: 24\.0 MiB/);
    await expectRestores(node, first);
  });
});

describe("a handle that is not what PVE said", () => {
  it("is refused: another size, no such handle, no such process", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    for (const [epoch, volume, sentence] of [
      [1000, { size: DISK_BYTES - 512 }, `its file handle has ${DISK_BYTES} bytes, PVE said ${DISK_BYTES - 512}`],
      [2000, { fileHandle: { pid: process.pid, fd: 1_000_000 } }, `process ${process.pid} has no open handle 1000000`],
      [3000, { fileHandle: { pid: 4_194_304, fd: 3 } }, "process 4194304 has no open handle 3"],
    ] as const) {
      const message = await failingJob(node, guest, { epoch, handOver: handing({ volume }) });
      expect(message).toMatch(new RegExp(sentence));
    }
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 5000, handOver: handing() }));
  });

  it("is refused when vzdump has closed it", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const closed = async (access: LabBackup): Promise<HandedOver> => {
      const handed = await HandedOver.open(access);
      await handed.handle(DISK).closeHandle();
      return handed;
    };
    const message = await failingJob(node, guest, { epoch: 1000, handOver: closed });
    expect(message).toMatch(/^Cannot open the file handle of "drive-scsi0": process \d+ has no open handle \d+$/);
  });
});

describe("nbdfuse", () => {
  /** Sends it a signal once it has read a little. */
  function inMidCopy(
    node: TestNode,
    signal: "SIGKILL" | "SIGSTOP",
  ): Pick<JobOptions, "bandwidthLimit" | "during" | "handOver"> {
    return {
      bandwidthLimit: SLOW,
      handOver: handing(),
      during: async () => {
        await until("nbdfuse was asked", () => (node.handedOver?.handle(DISK).reads.length ?? 0) > 0);
        node.handedOver?.handle(DISK).signal(signal);
      },
    };
  }

  it("that dies in mid-copy fails the job", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const dies = inMidCopy(node, "SIGKILL");
    expect(await failingJob(node, guest, { epoch: 1000, ...dies })).toMatch(
      /^Cannot read "drive-scsi0" through its file handle: the nbdfuse process behind it is gone \(E[A-Z]+\)$/,
    );
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 2000, handOver: handing() }));
  });

  it("that hangs in mid-copy fails the job within the time allowed", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const hangs = inMidCopy(node, "SIGSTOP");
    const startMs = performance.now();
    const message = await failingJob(node, guest, { epoch: 1000, ...hangs });
    expect(message).toBe(`Cannot read "${DISK}" through its file handle: no answer for 5 s`);
    expect(performance.now() - startMs).toBeLessThan(25_000);
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 2000, handOver: handing() }));
  });

  it("that hangs does not hold up a job that is cancelled", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const hangs = inMidCopy(node, "SIGSTOP");
    const cancel = new AbortController();
    const during = async (): Promise<void> => {
      await hangs.during?.();
      cancel.abort(new Error("stopped by the user"));
    };
    const timeouts = { connectTimeoutMs: 5_000, replyTimeoutMs: 3_600_000 }; // who waits for it is found by the runner
    const options = { ...hangs, during, signal: cancel.signal, timeouts };
    const { error } = await backUp(node, guest, { epoch: 1000, ...options });
    expect((error as Error).message).toBe("stopped by the user");
    expect(await list(node, VMID)).toEqual([]);
  });
});

describe("QEMU", () => {
  it("that breaks the snapshot is named as the one who did", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await guest.write(DISK, 0, seededBytes("all of it", 22 * MIB));
    const options = {
      bandwidthLimit: SLOW,
      fleecingBytes: MIB,
      handOver: handing(),
      during: async () => {
        await guest.write(DISK, 0, seededBytes("other", 20 * MIB)).catch(() => undefined);
      },
    };
    expect(await failingJob(node, guest, { epoch: 1000, ...options })).toMatch(
      /^Cannot read "drive-scsi0": QEMU gave up the snapshot of the disk during the backup/,
    );
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 2000, handOver: handing() }));
  });
});
