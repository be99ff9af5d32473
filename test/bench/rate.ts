// SPDX-License-Identifier: AGPL-3.0-or-later
// How exactly bandwidth-limit is kept: bytes that were read by the time it took.
import { closeSync, openSync } from "node:fs";
import { mkdir, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { writeSquashfs, writeTar } from "../../src/archive/index.ts";
import type { ArchiveCompression } from "../../src/archive/job.ts";
import { MIB } from "../../src/core/index.ts";
import { type Bench, fullJob } from "./bench.ts";
import { deviationRow, type Row } from "./report.ts";

const LIMIT = 100 * MIB;
/** 2 GiB: of a short archive most of the difference is what mksquashfs has to write after its last read. */
const FILES = 256;
const FILE_BYTES = 8 * MIB;
const TAR_PERCENT = 5;
const SQUASHFS_PERCENT = 10;
const VM_PERCENT = 5;
const never = new AbortController().signal;

export async function measureRate(bench: Bench): Promise<Row[]> {
  const tree = path.join(bench.area.memoryDir, "rate");
  await makeTree(tree);
  try {
    return [
      await vmRow(bench),
      await archiveRow(bench, tree, "tar", "none", TAR_PERCENT),
      await archiveRow(bench, tree, "tar", "zstd", TAR_PERCENT),
      await archiveRow(bench, tree, "squashfs", "none", SQUASHFS_PERCENT),
      await archiveRow(bench, tree, "squashfs", "zstd", SQUASHFS_PERCENT),
    ];
  } finally {
    await rm(tree, { recursive: true, force: true });
  }
}

async function makeTree(tree: string): Promise<void> {
  await mkdir(tree);
  const bytes = seededBytes("rate", FILE_BYTES);
  for (let file = 0; file < FILES; file++) {
    bytes.writeUInt32LE(file);
    await writeFile(path.join(tree, `file-${file}`), bytes);
  }
}

/** The whole of backup_vm counts, with the check of the image and the commit. */
async function vmRow(bench: Bench): Promise<Row> {
  const job = fullJob(bench, "none", bench.source, { bandwidthLimit: LIMIT });
  await job.run();
  const measured = bench.source.dataBytes / (job.last().backupMs / 1000);
  await job.remove();
  bench.progress("bandwidth-limit: VM");
  return deviationRow("bandwidth-limit: VM", measured, LIMIT, VM_PERCENT);
}

async function archiveRow(
  bench: Bench,
  directory: string,
  kind: "tar" | "squashfs",
  compression: ArchiveCompression,
  goalPercent: number,
): Promise<Row> {
  const archive = path.join(bench.area.diskDir, `rate.${kind}`);
  const archiveFd = openSync(archive, "wx+", 0o600);
  const job = { directory, sources: ["./"], excludePatterns: [], compression, bandwidthLimit: LIMIT, archiveFd };
  const write = kind === "tar" ? writeTar : writeSquashfs;
  const startMs = performance.now();
  await write({ ...job, inUserNamespace: false, log: () => undefined, signal: never });
  const measured = (FILES * FILE_BYTES) / ((performance.now() - startMs) / 1000);
  closeSync(archiveFd);
  await rm(archive);
  const measure = `bandwidth-limit: ${kind}, compression ${compression}`;
  bench.progress(measure);
  return deviationRow(measure, measured, LIMIT, goalPercent);
}
