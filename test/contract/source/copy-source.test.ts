// SPDX-License-Identifier: AGPL-3.0-or-later
// What every source of a VM's disk promises to the copy. Both are asked on the same backup access of a real block layer;
// the oracle is a raw copy of the disk at the moment of the backup.
import { readFile } from "node:fs/promises";
import { beforeEach, describe, expect, it } from "vitest";
import { type LabBackup, type LabGuest, seededBytes } from "../../../fixtures/lab/index.ts";
import type { CopySource } from "../../../src/block/copy-device.ts";
import { FileHandleSource, NbdSource } from "../../../src/source/index.ts";
import { TestNode } from "../../support/node/test-node.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { HandedOver } from "../../support/vm/file-handles.ts";
import { DISK, DISK_BYTES, MIB, never, startGuest } from "../../support/vm/vm-rules.ts";

const TIMEOUTS = { connectTimeoutMs: 20_000, replyTimeoutMs: 20_000 };
/** Of the lab's bitmaps, as of Proxmox VE's. */
const GRANULE = 4 * MIB;

interface OpenSource extends AsyncDisposable {
  readonly source: CopySource;
}

async function openNbd(access: LabBackup): Promise<OpenSource> {
  const volume = access.vmVolumes().get(DISK);
  if (volume === undefined) throw new Error("no such volume");
  const source = await NbdSource.open(DISK, volume, TIMEOUTS, never);
  return { source, [Symbol.asyncDispose]: () => source[Symbol.asyncDispose]() };
}

async function openFileHandle(access: LabBackup, { storeid }: TestNode): Promise<OpenSource> {
  const handed = await HandedOver.open(access);
  const volume = handed.volumes.get(DISK);
  if (volume?.fileHandle === undefined) throw new Error("no such handle");
  const common = { device: DISK, volume, handle: volume.fileHandle, storeid, calls: handed, timeouts: TIMEOUTS };
  const source = await FileHandleSource.open({ ...common, log: () => undefined }, never);
  return {
    source,
    [Symbol.asyncDispose]: async () => {
      await source[Symbol.asyncDispose]();
      await handed[Symbol.asyncDispose]();
    },
  };
}

const KINDS = [
  ["NbdSource", openNbd],
  ["FileHandleSource", openFileHandle],
] as const;

async function oracleOf(access: LabBackup): Promise<Buffer> {
  return await readFile(access.oracles.get(DISK) ?? "no such oracle");
}

/** Reads all extents; those that are said to be zero are not read. @returns the ranges, and the disk as they make it */
async function readAll(source: CopySource, onto: Buffer): Promise<Array<readonly [number, number]>> {
  const ranges: Array<readonly [number, number]> = [];
  for await (const { offset, length, zero } of source.extents(never)) {
    const last = ranges.at(-1);
    expect(offset, "ascending, without overlap").toBeGreaterThanOrEqual(last?.[1] ?? 0);
    ranges.push([offset, offset + length]);
    const target = onto.subarray(offset, offset + length);
    if (zero) target.fill(0);
    for (let at = 0; !zero && at < length; at += MIB) {
      await source.read(offset + at, target.subarray(at, Math.min(length, at + MIB)), never);
    }
  }
  return ranges;
}

describe.each(KINDS)("%s", (_kind, open) => {
  beforeEach((context) => requireTool(context, "qemu-storage-daemon", "nbdfuse", "nbdinfo", "fusermount3"));

  /** A guest with one finished backup behind it, which started its bitmap anew. */
  async function withGuest(work: (node: TestNode, guest: LabGuest) => Promise<void>): Promise<void> {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await work(node, guest);
  }
  const access = (node: TestNode, guest: LabGuest, mode: "new" | "use"): Promise<LabBackup> =>
    guest.openBackup({ modes: new Map([[DISK, mode]]), oracleDir: `${node.dir}/oracle-${mode}` });

  it("gives the whole disk where there is no bitmap, zeroes included", async () => {
    await withGuest(async (node, guest) => {
      await using backup = await access(node, guest, "new");
      await using opened = await open(backup, node);
      expect(opened.source.sizeBytes).toBe(DISK_BYTES);
      expect(await opened.source.dirtyBytes(never)).toBe(DISK_BYTES);
      const disk = Buffer.alloc(DISK_BYTES, 0xee); // what no extent covers shows
      const ranges = await readAll(opened.source, disk);
      expect(ranges[0]?.[0]).toBe(0);
      expect(ranges.at(-1)?.[1]).toBe(DISK_BYTES);
      expect(disk.equals(await oracleOf(backup))).toBe(true);
    });
  });

  it("gives what changed since the last backup and nothing else, as it was when this one began", async () => {
    await withGuest(async (node, guest) => {
      const first = await access(node, guest, "new");
      const before = await oracleOf(first);
      await first.finish(true);
      await guest.write(DISK, 9 * MIB, seededBytes("changed", 65536));
      await guest.write(DISK, 16 * MIB, Buffer.alloc(65536)); // dirty, and zero
      await using backup = await access(node, guest, "use");
      await using opened = await open(backup, node);
      await guest.write(DISK, 9 * MIB, seededBytes("during the backup", 65536));
      const disk = Buffer.from(before);
      const ranges = await readAll(opened.source, disk);
      const granules = new Set(
        ranges.flatMap(([from, to]) => [Math.floor(from / GRANULE), Math.ceil(to / GRANULE) - 1]),
      );
      expect([...granules].sort()).toEqual([2, 4]);
      expect(await opened.source.dirtyBytes(never)).toBe(2 * GRANULE);
      expect(disk.equals(await oracleOf(backup))).toBe(true);
    });
  });

  it("gives nothing of a disk that did not change", async () => {
    await withGuest(async (node, guest) => {
      await (await access(node, guest, "new")).finish(true);
      await using backup = await access(node, guest, "use");
      await using opened = await open(backup, node);
      expect(await opened.source.dirtyBytes(never)).toBe(0);
      expect(await readAll(opened.source, Buffer.alloc(DISK_BYTES))).toEqual([]);
    });
  });

  it("reads the same after what was read before was discarded", async () => {
    await withGuest(async (node, guest) => {
      await using backup = await access(node, guest, "new");
      await using opened = await open(backup, node);
      const { source } = opened;
      const [first, second] = [Buffer.alloc(MIB), Buffer.alloc(MIB)];
      await source.read(0, first, never);
      if (source.canDiscard) await source.discard({ offset: 0, length: MIB }, never);
      await source.read(MIB, second, never);
      const oracle = await oracleOf(backup);
      expect(first.equals(oracle.subarray(0, MIB))).toBe(true);
      expect(second.equals(oracle.subarray(MIB, 2 * MIB))).toBe(true);
    });
  });

  it("rejects a read with the reason of the signal", async () => {
    await withGuest(async (node, guest) => {
      await using backup = await access(node, guest, "new");
      await using opened = await open(backup, node);
      const reason = new Error("enough");
      await expect(opened.source.read(0, Buffer.alloc(MIB), AbortSignal.abort(reason))).rejects.toBe(reason);
    });
  });

  it("rejects a read that reaches beyond the end of the disk", async () => {
    await withGuest(async (node, guest) => {
      await using backup = await access(node, guest, "new");
      await using opened = await open(backup, node);
      await expect(opened.source.read(DISK_BYTES - 65536, Buffer.alloc(MIB), never)).rejects.toThrow();
    });
  });
});
