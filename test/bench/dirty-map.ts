// SPDX-License-Identifier: AGPL-3.0-or-later
// A dirty map of a million extents: every other granule of a disk. Real writes would take minutes, so
// QEMU makes a bitmap with one bit per cluster of it, and this sets the others in the closed image.
import { open } from "node:fs/promises";
import path from "node:path";
import { LabGuest } from "../../fixtures/lab/index.ts";
import { KIB, MIB } from "../../src/core/index.ts";
import type { Bench, JobRun } from "./bench.ts";
import { seconds } from "./contest.ts";
import { backUpGuest } from "./guest-job.ts";
import { runTimed } from "./processes.ts";
import { memoryRow, type Row } from "./report.ts";
import { DEVICE } from "./source-disk.ts";
import { BenchError } from "./work-area.ts";

const EXTENTS = 1_000_000;
const GRANULE_BYTES = 64 * KIB;
const DISK_BYTES = 2 * EXTENTS * GRANULE_BYTES;
/** The first part of the disk holds data; the rest is dirty and zero, or a run would copy 61 GiB. */
const DATA_BYTES = 256 * MIB;
const CLUSTER_BYTES = 64 * KIB;
/** Guest bytes that one cluster of the bitmap's data describes. */
const BITMAP_REACH_BYTES = CLUSTER_BYTES * 8 * GRANULE_BYTES;
/** Bits 1, 3, 5, 7 of every byte: granules 1, 3, 5, 7. */
const EVERY_OTHER = 0xaa;
const STOREID = "bench";
const VMID = 103;
const VMGENID = "0c3c4a86-8c0e-4ae6-9b83-0d8f2e6f5f11";

export async function measureDirtyMap(bench: Bench): Promise<Row[]> {
  const job = await backUpDirtyMap(bench);
  if (job.firstByteMs === undefined) throw new BenchError("The job with the large dirty map has read nothing");
  bench.progress(`a dirty map of ${EXTENTS} extents: ${seconds(job.ms)} in all`);
  return [
    memoryRow("dirty map of 1,000,000 extents: peak memory", job.peakBytes, 200),
    {
      measure: "dirty map of 1,000,000 extents: first byte",
      ours: seconds(job.firstByteMs),
      against: "",
      value: job.firstByteMs / 1000,
      unit: "s",
      goal: 2,
      isGoalMinimum: false,
      samples: { "whole job": [job.ms] },
    },
  ];
}

async function backUpDirtyMap(bench: Bench): Promise<JobRun> {
  const dir = path.join(bench.area.memoryDir, `vm-${VMID}`);
  const storePath = path.join(bench.area.diskDir, `store-${VMID}`);
  const options = { dir, vmid: VMID, storeid: STOREID, vmgenid: VMGENID };
  {
    await using empty = await LabGuest.start({ ...options, disks: [{ device: DEVICE, sizeBytes: DISK_BYTES }] });
    await backUpGuest(empty, storePath, "none");
  }
  const image = path.join(dir, "fragmented.qcow2");
  await makeFragmentedImage(image);
  await using guest = await LabGuest.start({ ...options, disks: [{ device: DEVICE, sizeBytes: DISK_BYTES, image }] });
  // The lab's own bitmap is coarser than this one and could not take it in: nobody needs it again.
  return await backUpGuest(guest, storePath, "use", { finish: false });
}

/** An image whose persistent bitmap says that every other granule is dirty. */
async function makeFragmentedImage(image: string): Promise<void> {
  const bitmap = `snapshot-access:${STOREID}`;
  await runTimed("qemu-img", ["create", "-q", "-f", "qcow2", image, `${DISK_BYTES}`]);
  const writes = [`write -P 7 0 ${DATA_BYTES}`];
  await runTimed("qemu-io", ["-f", "qcow2", ...commands(writes), image]);
  await runTimed("qemu-img", ["bitmap", "--add", "-g", `${GRANULE_BYTES}`, "-f", "qcow2", image, bitmap]);
  const bits: string[] = [];
  for (let at = GRANULE_BYTES; at < DISK_BYTES; at += BITMAP_REACH_BYTES) bits.push(`write -z ${at} ${GRANULE_BYTES}`);
  await runTimed("qemu-io", ["-f", "qcow2", ...commands(bits), image]);
  await fillBitmap(image);
}

const commands = (lines: readonly string[]): string[] => lines.flatMap((line) => ["-c", line]);

/**
 * Overwrites the data clusters of the image's one bitmap.
 * Source: QEMU docs/interop/qcow2.txt, "Bitmaps extension", "Bitmap directory", "Bitmap table".
 */
async function fillBitmap(image: string): Promise<void> {
  const handle = await open(image, "r+");
  try {
    const header = Buffer.alloc(CLUSTER_BYTES);
    await handle.read(header, 0, CLUSTER_BYTES, 0);
    const directory = Buffer.alloc(24);
    await handle.read(directory, 0, directory.length, directoryOffset(header));
    const tableOffset = Number(directory.readBigUInt64BE(0));
    const table = Buffer.alloc(directory.readUInt32BE(8) * 8);
    await handle.read(table, 0, table.length, tableOffset);
    const bits = DISK_BYTES / GRANULE_BYTES;
    for (let entry = 0; entry * 8 < table.length; entry++) {
      const offset = Number(table.readBigUInt64BE(entry * 8));
      if (offset % CLUSTER_BYTES !== 0 || offset === 0) throw new BenchError("QEMU has stored the bitmap otherwise");
      const bytes = Math.min(CLUSTER_BYTES, bits / 8 - entry * CLUSTER_BYTES);
      await handle.write(Buffer.alloc(bytes, EVERY_OTHER), 0, bytes, offset);
    }
  } finally {
    await handle.close();
  }
}

/** Walks the header extensions to the one with type 0x23852875. */
function directoryOffset(header: Buffer): number {
  for (let at = header.readUInt32BE(100); at < header.length; ) {
    const type = header.readUInt32BE(at);
    const length = header.readUInt32BE(at + 4);
    // number of bitmaps u32 | reserved u32 | size of the directory u64 | its offset u64
    if (type === 0x23852875) return Number(header.readBigUInt64BE(at + 8 + 16));
    at += 8 + Math.ceil(length / 8) * 8;
  }
  throw new BenchError("QEMU has stored no bitmap in the image");
}
