// SPDX-License-Identifier: AGPL-3.0-or-later
// Peak memory of Node, as the kernel counts it: of a common disk, and of the largest.
import { type Bench, fullJob } from "./bench.ts";
import { seconds } from "./contest.ts";
import { memoryRow, type Row } from "./report.ts";
import { HUGE_DISK, makeSourceDisk, type SourceDisk } from "./source-disk.ts";

const GOAL_MIB = 200;
const KINDS = ["none", "zlib", "zstd"] as const;

export async function measureMemory(bench: Bench): Promise<Row[]> {
  bench.progress("making a disk of 16 TiB");
  await using huge = await makeSourceDisk(bench.area.memoryDir, "huge", HUGE_DISK);
  return [
    await peakOf(bench, bench.source, "peak memory of Node, disk of 4 GiB, worst of none, zlib, zstd"),
    await peakOf(bench, huge, "peak memory of Node, disk of 16 TiB, worst of none, zlib, zstd"),
  ];
}

async function peakOf(bench: Bench, source: SourceDisk, measure: string): Promise<Row> {
  const peaks: Record<string, readonly number[]> = {};
  for (const kind of KINDS) {
    const job = fullJob(bench, kind, source);
    const ms = await job.run();
    peaks[kind] = [job.last().peakBytes];
    bench.progress(`${measure}: ${kind} took ${seconds(ms)}`);
    await job.remove();
  }
  return { ...memoryRow(measure, Math.max(...Object.values(peaks).flat()), GOAL_MIB), samples: peaks };
}
