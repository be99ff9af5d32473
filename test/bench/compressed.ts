// SPDX-License-Identifier: AGPL-3.0-or-later
// Compressed full backups against qemu-img's compression of the same kind: time and size.
import { stat } from "node:fs/promises";
import path from "node:path";
import { formatBytes } from "../../src/core/index.ts";
import { type Bench, fullJob, mustEqualSource } from "./bench.ts";
import { compete, medianOf } from "./contest.ts";
import { convertContestant } from "./full.ts";
import { limitRow, type Row, speedRow } from "./report.ts";

const KINDS = [
  { kind: "zlib", goal: 1.5 },
  { kind: "zstd", goal: 1.3 },
] as const;
/** qemu-img takes half a minute or more for zlib, and the ratio is far from its goal. */
const MAX_ZLIB_RUNS = 2;
/** "Within 5 % of its size": larger is what hurts. */
const SIZE_GOAL = 1.05;

export async function measureCompressed(bench: Bench): Promise<Row[]> {
  const rows: Row[] = [];
  for (const { kind, goal } of KINDS) {
    const flags = ["-c", "-W", "-m", "8", "-o", `compression_type=${kind}`];
    const ours = fullJob(bench, kind);
    const convert = convertContestant(bench, flags);
    let ourBytes = 0;
    let theirBytes = 0;
    const contestants = [
      {
        ...ours,
        async run() {
          const ms = await ours.run();
          if (ourBytes === 0) await mustEqualSource(bench.source, ours.last().imagePath);
          ourBytes = ours.last().imageBytes;
          return ms;
        },
      },
      {
        ...convert,
        async run() {
          const ms = await convert.run();
          theirBytes = (await stat(path.join(bench.area.diskDir, "peer.qcow2"))).size;
          return ms;
        },
      },
    ];
    const runs = kind === "zlib" ? Math.min(bench.runs, MAX_ZLIB_RUNS) : bench.runs;
    const times = await compete(contestants, runs, bench.progress);
    const samples = Object.fromEntries(times);
    const [ourMs, theirMs] = [medianOf(times, ours.name), medianOf(times, convert.name)];
    rows.push({ ...speedRow(`${kind}, against qemu-img -c -W -m 8`, ourMs, theirMs, goal), samples });
    const sizes = [formatBytes(ourBytes), formatBytes(theirBytes)] as const;
    rows.push(limitRow(`${kind}: size of the image`, ...sizes, ourBytes / theirBytes, SIZE_GOAL));
  }
  return rows;
}
