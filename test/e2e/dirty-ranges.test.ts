// SPDX-License-Identifier: AGPL-3.0-or-later
// Incrementals at the byte: what is dirty is taken as it is, what is not dirty is never touched.
import { readFile, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { writeGuestFiles } from "../../fixtures/lab/guest-config.ts";
import { compareRaw, isSnapshotSafeFromZeroes, runTool, seededBytes } from "../../fixtures/lab/index.ts";
import type { VmVolume } from "../../src/provider/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { BareDisk } from "../support/vm/bare-disk.ts";
import { restore } from "../support/vm/vm-job.ts";
import {
  DISK,
  DISK_BYTES,
  expectRestores,
  MIB,
  modeOf,
  mustBackUp,
  never,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

const KIB = 1024;

interface MapEntry {
  readonly start: number;
  readonly length: number;
  readonly depth: number;
  readonly zero: boolean;
}

/** What the image at the top of the chain says itself, by qemu-img. */
async function ownMap(node: TestNode, epoch: number): Promise<MapEntry[]> {
  const image = path.join(node.storePath, `100/qemu-${epoch}/${DISK}.qcow2`);
  const map = JSON.parse(await runTool("qemu-img", ["map", "--output=json", image])) as MapEntry[];
  return map.filter(({ depth }) => depth === 0);
}

describe("a range that became zero", () => {
  it.each([
    ["by zeroes that were written", (guest: Guest) => guest.write(DISK, MIB, Buffer.alloc(2 * MIB))],
    ["by a zero request", (guest: Guest) => guest.writeZeroes(DISK, MIB, 2 * MIB)],
    ["by a discard", (guest: Guest) => guest.discard(DISK, MIB, 2 * MIB)],
  ])("%s hides the base", async (_how, clear) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await clear(guest);
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe("incremental since backup/100/qemu-1000");
    const zero = (await ownMap(node, 2000)).filter((entry) => entry.zero);
    expect(zero).toContainEqual(expect.objectContaining({ start: MIB, length: 2 * MIB }));
    await expectRestores(node, first, second);
  });
});

type Guest = Awaited<ReturnType<typeof startGuest>>;

describe("a clean bitmap", () => {
  it("makes an empty incremental that is valid and restores", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe("incremental since backup/100/qemu-1000");
    const image = path.join(node.storePath, `100/qemu-2000/${DISK}.qcow2`);
    expect((await stat(image)).size).toBeLessThan(MIB);
    expect(await ownMap(node, 2000)).toEqual([]);
    await runTool("qemu-img", ["check", "-q", image]);
    await expectRestores(node, second);
  });
});

describe("guest writes during the backup", () => {
  it("are not in it, and are in the next one", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const mayZero = await isSnapshotSafeFromZeroes();
    await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 0, seededBytes("before", 6 * MIB));
    const second = await mustBackUp(node, guest, {
      epoch: 2000,
      bandwidthLimit: 16 * MIB,
      during: async () => {
        await guest.write(DISK, MIB, seededBytes("during", 4 * MIB));
        if (mayZero) await guest.writeZeroes(DISK, 3 * MIB, MIB);
        await guest.write(DISK, 20 * MIB, seededBytes("during too", MIB));
      },
    });
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe("incremental since backup/100/qemu-2000");
    await expectRestores(node, second, third);
  });
});

describe("dirty ranges smaller than a cluster", () => {
  it("are completed from the base, and nothing around them is read", async () => {
    await using node = await TestNode.create();
    const content = Buffer.concat([seededBytes("bare", 3 * MIB), Buffer.alloc(MIB), seededBytes("tail", 4608)]);
    await using disk = await BareDisk.start(path.join(node.dir, "bare"), DISK, content);
    const config = { vmid: VMID, vmgenid: "4c2f0c5e-0d1c-4b4e-9c3b-6f1f1e1f2a3b", disks: [] };
    await writeGuestFiles(node.root, config, disk.pid);
    const job = async (epoch: number, volume: () => Promise<VmVolume>): Promise<void> => {
      await using provider = node.provider();
      await provider.backup.backupInit(VMID, "qemu", epoch, never);
      await provider.backup.backupVmQueryIncremental(VMID, new Map([[DISK, { size: disk.sizeBytes }]]), never);
      const guestConfig = Buffer.from(`vmgenid: ${config.vmgenid}\n`);
      const info = { bandwidthLimit: 0, firewallConfig: undefined };
      await provider.backup.backupVm(VMID, guestConfig, new Map([[DISK, await volume()]]), info, never);
    };
    await job(1000, async () => disk.volume("new"));
    await disk.startBitmap(4 * KIB);
    const expected = Buffer.from(content);
    const write = async (offset: number, bytes: Buffer): Promise<void> => {
      await disk.write(offset, bytes);
      bytes.copy(expected, offset);
    };
    await write(8 * KIB, seededBytes(1, 4 * KIB));
    await write(24 * KIB, Buffer.alloc(8 * KIB)); // zeroes in a cluster of data
    await write(124 * KIB, seededBytes(2, 8 * KIB)); // across the border of two clusters
    await write(256 * KIB, seededBytes(3, 64 * KIB)); // one whole cluster
    await write(3 * MIB + 300 * KIB, seededBytes(4, 4 * KIB)); // in a cluster that the base has as zero
    await write(4 * MIB + 4096, seededBytes(5, 512)); // the short end of the disk
    // Beside every dirty range lies what must not get into the backup.
    for (const at of [0, 12, 60, 120, 136, 3 * KIB + 296]) await disk.tamper(at * KIB, Buffer.alloc(4 * KIB, 0xbd));
    await disk.tamper(4 * MIB, Buffer.alloc(4 * KIB, 0xbd));
    await job(2000, () => disk.offerBitmap());
    const oracle = path.join(node.dir, "expected.raw");
    await writeFile(oracle, expected);
    await restore(node, "backup/100/qemu-2000", async (_device, rawPath) => {
      expect(await compareRaw(rawPath, oracle)).toMatchObject({ identical: true });
    });
    expect((await readFile(disk.file)).equals(expected)).toBe(false); // or the test could not fail
  });
});

describe("the size of a disk", () => {
  it("may be no multiple of a cluster", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: DISK_BYTES + 512 }] });
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, DISK_BYTES, seededBytes("end", 512));
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toContain("incremental");
    await expectRestores(node, first, second);
  });
});
