// SPDX-License-Identifier: AGPL-3.0-or-later
// What one call from Perl costs when Node has to start for it, as listings and notes do.
import { mkdir } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";
import type { Bench } from "./bench.ts";
import { median, seconds } from "./contest.ts";
import { runTimed } from "./processes.ts";
import { limitRow, type Row } from "./report.ts";

const RUNS = 15;

/** The checkout; the bundle of this file lies in dist/. */
const checkout = (file: string): string => fileURLToPath(new URL(`../${file}`, import.meta.url));

export async function measureShim(bench: Bench): Promise<Row[]> {
  const storePath = path.join(bench.area.diskDir, "store-shim");
  await mkdir(storePath, { recursive: true });
  const { stdout } = await runTimed("env", [
    `PVE_BACKUP_HOST_NODE=${process.execPath}`,
    `PVE_BACKUP_HOST_BRIDGE=${checkout("dist/bridge.mjs")}`,
    ...["perl", "-T", "-I", checkout("perl-shim"), checkout("test/bench/first-reply.pl"), `${RUNS}`, storePath],
  ]);
  const lines = stdout
    .trim()
    .split("\n")
    .map((line) => line.split(" ").map(Number));
  const calls = lines.map(([call]) => call ?? Number.NaN);
  const empty = lines.map(([, ms]) => ms ?? Number.NaN);
  const [callMs, emptyMs] = [median(calls), median(empty)];
  bench.progress(`first reply after ${seconds(callMs)}, node -e 0 takes ${seconds(emptyMs)}`);
  const row = limitRow(
    "shim call to first reply, against node -e 0",
    seconds(callMs),
    seconds(emptyMs),
    callMs / emptyMs,
    2,
  );
  return [{ ...row, samples: { call: calls, "node -e 0": empty } }];
}
