// SPDX-License-Identifier: AGPL-3.0-or-later
// A full backup through PVE's FUSE file against the loop of the upstream example on the same file.
import { mkdir } from "node:fs/promises";
import { type Bench, fullJob, mustEqualSource } from "./bench.ts";
import { compete, medianOf, seconds } from "./contest.ts";
import { loopFrom, mountFuse } from "./full.ts";
import { type Row, speedRow } from "./report.ts";
import { DEVICE } from "./source-disk.ts";

export async function measureFileHandle(bench: Bench): Promise<Row[]> {
  // Named as PVE names it: our side finds the NBD socket beside it.
  const folder = `${bench.source.socket}.${DEVICE}.${process.pid}`;
  const file = `${folder}/${DEVICE}`;
  await mkdir(folder);
  await using _source = await mountFuse(bench, file, ["-r", file, bench.source.uri]);
  const ours = fullJob(bench, "none", bench.source, { fuseFile: file });
  const nbd = fullJob(bench, "none");
  await ours.run(); // a warm-up, and the proof
  await mustEqualSource(bench.source, ours.last().imagePath);
  const times = await compete([ours, nbd], bench.runs, bench.progress);
  const loopMs = await loopFrom(bench, file, "iflag=direct");
  bench.progress(`the loop on the same FUSE file: ${seconds(loopMs)}`);
  const ourMs = medianOf(times, ours.name);
  return [
    {
      ...speedRow("file handle, against a 4 MiB loop on the same FUSE file", ourMs, loopMs, 5),
      samples: Object.fromEntries(times),
    },
    {
      ...speedRow("for scale: file handle, against our own way over NBD", ourMs, medianOf(times, nbd.name), 0),
      goal: undefined,
    },
  ];
}
