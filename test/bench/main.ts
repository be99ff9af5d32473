// SPDX-License-Identifier: AGPL-3.0-or-later
// make bench: measures the product against its peers on this machine; see docs/benchmarks.md.
// Usage: node dist/bench.mjs [--dir <folder>] [--runs <n>] [--only full,compressed,...] [--json <file>]
import { writeFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import type { Bench } from "./bench.ts";
import { measureCompressed } from "./compressed.ts";
import { measureContainer } from "./container.ts";
import { measureContent } from "./content.ts";
import { measureDirtyMap } from "./dirty-map.ts";
import { measureFileHandle } from "./file-handle.ts";
import { measureFull } from "./full.ts";
import { measureIncremental } from "./incremental.ts";
import { measureMemory } from "./memory.ts";
import { measureRate } from "./rate.ts";
import { describeMachine, formatTable, isMet, type Row } from "./report.ts";
import { measureShim } from "./shim.ts";
import { makeSourceDisk, PLAIN_DISK } from "./source-disk.ts";
import { BenchError, openWorkArea } from "./work-area.ts";

const PARTS: Readonly<Record<string, (bench: Bench) => Promise<Row[]>>> = {
  full: measureFull,
  "file-handle": measureFileHandle,
  compressed: measureCompressed,
  incremental: measureIncremental,
  content: measureContent,
  "dirty-map": measureDirtyMap,
  memory: measureMemory,
  shim: measureShim,
  container: measureContainer,
  rate: measureRate,
};

interface Options {
  readonly dir: string;
  readonly runs: number;
  readonly parts: readonly string[];
  readonly json: string;
}

function readOptions(): Options {
  const { values } = parseArgs({
    options: {
      dir: { type: "string", default: "dist/bench-work" },
      runs: { type: "string", default: "3" },
      only: { type: "string", default: Object.keys(PARTS).join(",") },
      json: { type: "string", default: "bench-results.json" },
    },
  });
  const runs = Number(values.runs);
  if (!Number.isInteger(runs) || runs < 1) throw new BenchError(`Cannot run ${values.runs} times: wanted 1 or more`);
  const parts = values.only.split(",");
  const unknown = parts.find((part) => !(part in PARTS));
  if (unknown !== undefined) {
    throw new BenchError(`Cannot measure "${unknown}": it is unknown, wanted some of ${Object.keys(PARTS).join(", ")}`);
  }
  return { dir: values.dir, runs, parts, json: values.json };
}

async function main(): Promise<void> {
  const options = readOptions();
  const startMs = performance.now();
  const progress = (line: string): void =>
    void process.stderr.write(`[${((performance.now() - startMs) / 1000).toFixed(0).padStart(3)} s] ${line}\n`);
  const machine = describeMachine();
  await using area = await openWorkArea(options.dir);
  progress("making the source disk: 4 GiB in memory, 2 GiB of it data");
  await using source = await makeSourceDisk(area.memoryDir, "source", PLAIN_DISK);
  const bench: Bench = { area, source, runs: options.runs, progress };
  const rows: Row[] = [];
  for (const part of options.parts) rows.push(...((await PARTS[part]?.(bench)) ?? []));
  const date = new Date().toISOString();
  await writeFile(options.json, `${JSON.stringify({ date, machine, runs: options.runs, rows }, undefined, 2)}\n`);
  const versions = Object.entries(machine.versions).map(([name, version]) => `${name} ${version}`);
  process.stdout.write(`\n${machine.cores} cores, ${machine.cpu}; ${versions.join("; ")}\n\n${formatTable(rows)}\n\n`);
  const goals = rows.filter(({ goal }) => goal !== undefined);
  const missed = goals.filter((row) => !isMet(row)).length;
  process.stdout.write(`${goals.length - missed} goals met, ${missed} missed; details in ${options.json}\n`);
}

for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(130));
try {
  await main();
} catch (error) {
  process.stderr.write(`${error instanceof BenchError ? error.message : (error as Error).stack}\n`);
  process.exitCode = 1;
}
