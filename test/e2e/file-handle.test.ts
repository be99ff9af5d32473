// SPDX-License-Identifier: AGPL-3.0-or-later
// Mechanism "file-handle": PVE's FUSE file and its closure in place of the NBD export, by the same rules.
import { readdir, readlink } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { compareImages, isSnapshotSafeFromZeroes, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { type HandedOver, handing } from "../support/vm/file-handles.ts";
import { list } from "../support/vm/vm-job.ts";
import { DISK, expectRestores, MIB, modeOf, mustBackUp, never, openJob, startGuest } from "../support/vm/vm-rules.ts";

const KIB = 1024;

const handOver = handing();

/** What the last job was handed over as. */
function handedOver(node: TestNode): HandedOver {
  if (node.handedOver === undefined) throw new Error("nothing was handed over");
  return node.handedOver;
}

/** Handles of this process on FUSE files of a backup. */
async function openFuseFiles(): Promise<string[]> {
  const targets = (await readdir("/proc/self/fd")).map((fd) => readlink(`/proc/self/fd/${fd}`).catch(() => ""));
  return (await Promise.all(targets)).filter((target) => /nbd\.backup-access\.[^/]+\/drive-/.test(target));
}

describe("a backup through file handles", () => {
  it("is full, incremental, empty, and hides the base where zeroes came; every point restores", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver });
    expect(modeOf(first.job)).toBe("full: first backup");
    await guest.write(DISK, 9 * MIB, seededBytes("second", 300 * KIB));
    const second = await mustBackUp(node, guest, { epoch: 2000, handOver });
    expect(modeOf(second.job)).toBe("incremental since backup/100/qemu-1000");
    const third = await mustBackUp(node, guest, { epoch: 3000, handOver });
    expect(third.job.log.join("\n")).toContain(`${DISK}: nothing changed`);
    await guest.discard(DISK, MIB, 2 * MIB);
    const fourth = await mustBackUp(node, guest, { epoch: 4000, handOver });
    await expectRestores(node, first, second, third, fourth);
  });

  it("goes on from a backup over NBD, and the other way round", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const points = [await mustBackUp(node, guest, { epoch: 1000 })];
    for (const [epoch, way] of [
      [2000, { handOver }],
      [3000, {}],
    ] as const) {
      await guest.write(DISK, epoch * KIB, seededBytes(epoch, 70 * KIB));
      const next = await mustBackUp(node, guest, { epoch, ...way });
      expect(modeOf(next.job)).toBe(`incremental since ${points.at(-1)?.volname}`);
      points.push(next);
    }
    await expectRestores(node, ...points);
  });

  it("takes disks that end in the middle of a cluster and of a page", async () => {
    await using node = await TestNode.create();
    const sizeBytes = 20 * MIB + 512;
    await using guest = await startGuest(node, {
      disks: [
        { device: DISK, sizeBytes },
        { device: "drive-scsi1", sizeBytes: 4 * MIB + 3 * KIB },
      ],
    });
    await guest.write(DISK, sizeBytes - 700, seededBytes("tail", 700));
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver });
    await guest.write(DISK, sizeBytes - 3, seededBytes("last bytes", 3));
    await guest.write("drive-scsi1", 4 * MIB, seededBytes("other", 3 * KIB));
    const second = await mustBackUp(node, guest, { epoch: 2000, handOver });
    expect(modeOf(second.job)).toMatch(/^incremental/);
    await expectRestores(node, first, second);
  });

  it("does not see what the guest writes meanwhile; the next backup does", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const mayZero = await isSnapshotSafeFromZeroes();
    await mustBackUp(node, guest, { epoch: 1000, handOver });
    await guest.write(DISK, 0, seededBytes("before", 6 * MIB));
    const during = async (): Promise<void> => {
      for (let at = 0; at < 6; at++) await guest.write(DISK, at * MIB, seededBytes(`during ${at}`, 600 * KIB));
      if (mayZero) await guest.discard(DISK, 3 * MIB, 64 * KIB);
      await guest.write(DISK, 20 * MIB, seededBytes("elsewhere", 64 * KIB));
    };
    const options = { handOver, during, bandwidthLimit: 8 * MIB };
    const second = await mustBackUp(node, guest, { epoch: 2000, ...options });
    const third = await mustBackUp(node, guest, { epoch: 3000, handOver });
    expect(modeOf(third.job)).toBe("incremental since backup/100/qemu-2000");
    await expectRestores(node, second, third);
  });

  it("reads nothing outside the dirty regions, nothing twice, and no zeroes", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000, handOver });
    // Dirty granules of 4 MiB: 4, 12 and the last one. Inside of them there is little data.
    for (const mib of [5, 13, 23]) await guest.write(DISK, mib * MIB, seededBytes(mib, 128 * KIB));
    const second = await mustBackUp(node, guest, { epoch: 2000, handOver });
    const reads = handedOver(node)
      .handle(DISK)
      .reads.sort((a, b) => a.offset - b.offset);
    for (const [at, { offset, length }] of reads.entries()) {
      const granules = [4, 12, 20].filter((mib) => mib * MIB <= offset && offset + length <= (mib + 4) * MIB);
      expect(granules, `${length} bytes at ${offset}`).toHaveLength(1);
      const before = reads[at - 1];
      if (before !== undefined) expect(offset).toBeGreaterThanOrEqual(before.offset + before.length);
    }
    const readBytes = reads.reduce((sum, { length }) => sum + length, 0);
    expect(readBytes).toBeGreaterThanOrEqual(3 * 128 * KIB);
    expect(readBytes).toBeLessThanOrEqual(MIB + 3 * 128 * KIB); // the guest's first granule still has its data
    await expectRestores(node, second);
  });

  it("waits for the dirty regions as long as for any answer of QEMU's", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000, handOver });
    expect(handedOver(node).timeoutsMs).toEqual([5_000]);
  });

  it("closes the file before backup_vm returns, after a success and after a failure", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    for (const [epoch, lies, wanted] of [
      [1000, {}, true],
      [2000, { volume: { size: 512 } }, false],
    ] as const) {
      await using provider = node.provider();
      const { access } = await openJob(provider, guest, { epoch });
      node.handedOver = await handing(lies)(access);
      const { volumes } = node.handedOver;
      const info = { bandwidthLimit: 0, firewallConfig: undefined };
      const isDone = await provider.backup
        .backupVm(guest.vmid, Buffer.from(guest.guestConfig), volumes, info, never)
        .then(
          () => true,
          () => false,
        );
      const openAtEnd = await openFuseFiles();
      await node.handedOver[Symbol.asyncDispose]();
      await access.finish(isDone);
      await provider.backup.backupCleanup(guest.vmid, "qemu", isDone, undefined, never);
      expect(isDone).toBe(wanted);
      expect(openAtEnd).toHaveLength(1); // the Perl side's own
    }
    expect(await list(node, guest.vmid)).toEqual(["backup/100/qemu-1000"]);
  });

  it("gives up what is safely written, in batches inside the disk's dirty regions", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: 128 * MIB }] });
    await guest.write(DISK, 16 * MIB, seededBytes("much", 80 * MIB));
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver });
    const given = handedOver(node).given.flat();
    expect(given.reduce((sum, { length }) => sum + length, 0)).toBeGreaterThanOrEqual(32 * MIB);
    for (const [at, { offset, length }] of given.entries()) {
      const before = given[at - 1];
      expect(offset).toBeGreaterThanOrEqual(before === undefined ? 0 : before.offset + before.length);
      expect(offset + length).toBeLessThanOrEqual(128 * MIB);
    }
    for (let at = 0; at < 128; at += 8) await guest.write(DISK, at * MIB, seededBytes(at, 4 * MIB));
    const second = await mustBackUp(node, guest, { epoch: 2000, handOver });
    expect(handedOver(node).given.map((ranges) => ranges.length)[0]).toBe(8); // each of them apart: 32 MiB together
    for (const { offset, length } of handedOver(node).given.flat()) {
      expect(length).toBeLessThanOrEqual(4 * MIB - (offset % (8 * MIB)));
    }
    expect(`${first.job.log}${second.job.log}`).not.toContain("warn:");
    await expectRestores(node, first, second);
  });

  it("gives up stretches of zeroes that are longer than a request can be", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    const sizeBytes = 5 * 1024 * MIB;
    await using guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes }] });
    await guest.write(DISK, sizeBytes - 96 * MIB, seededBytes("end", 96 * MIB));
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver });
    const given = handedOver(node).given.flat();
    expect(given.reduce((sum, { length }) => sum + length, 0)).toBeGreaterThan(4096 * MIB);
    for (const { length } of given) expect(length).toBeLessThanOrEqual(1024 * MIB);
    expect(`${first.job.log}`).not.toContain("warn:");
    // Stock qemu-img on the store's own file: five gigabytes through a FUSE file take their time.
    const image = `${node.storePath}/100/qemu-1000/${DISK}.qcow2`;
    expect(await compareImages(image, "qcow2", first.oracles.get(DISK) ?? "none", "raw")).toMatchObject({
      identical: true,
    });
  });

  it("goes on when ranges cannot be given up, and warns once", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: 128 * MIB }] });
    await guest.write(DISK, 0, seededBytes("much", 100 * MIB));
    const unable = handing({ deallocate: "fallocate: punch hole failed" });
    const first = await mustBackUp(node, guest, { epoch: 1000, handOver: unable });
    expect(handedOver(node).given).toHaveLength(1);
    expect(first.job.log.filter((line) => line.startsWith("warn"))).toEqual([
      `warn: ${DISK}: no more discards of the fleecing image: fallocate: punch hole failed`,
    ]);
    await expectRestores(node, first);
  });
});
