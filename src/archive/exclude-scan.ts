// SPDX-License-Identifier: AGPL-3.0-or-later
// Finds what tar would leave out, for mksquashfs, which knows neither tar's patterns nor several sources:
// excluded paths, sockets, and the contents of file systems that are no source. One pass of GNU find over
// names and types (a fraction of a second for 100,000 files).

import { lstat, readdir } from "node:fs/promises";
import { ChildProcessError, environmentError, toBytes, toText } from "../core/index.ts";
import { ChildProcess, waitForChildren } from "../host/index.ts";
import type { ArchiveJob } from "./job.ts";
import { contentsExcludeLines, findTests, LOST_AND_FOUND, nativeExcludeLines, pathExcludeLine } from "./patterns.ts";

/** One path of the kernel is at most 4096 bytes; a record adds its type and a device number. */
const MAX_RECORD_CHARS = 8_192;
/** What find says of something that went away meanwhile: no reason to fail. */
const VANISHED = /: (?:No such file or directory|Not a directory)$/;

interface ExcludeScan {
  /** Lines of an exclude file for `mksquashfs -wildcards`, as bytes ("latin1"). */
  readonly lines: readonly string[];
  readonly sockets: number;
  readonly firstSocket: string | undefined;
}

interface Findings {
  readonly lines: Set<string>;
  readonly sockets: string[];
  /** Folders on another device than their source. */
  readonly boundaries: string[];
}

interface Tests {
  /** Told to mksquashfs as patterns: find only leaves them. */
  readonly silent: string[];
  /** Told to mksquashfs as the paths that find found. */
  readonly loud: string[];
}

/** @throws ChildProcessError if find cannot run or cannot list a folder; EnvironmentError for a source that is missing */
export async function scanExcludes(job: ArchiveJob): Promise<ExcludeScan> {
  const findings: Findings = { lines: new Set(), sockets: [], boundaries: [] };
  const tests = planTests(job.excludePatterns.map(toBytes), findings.lines);
  const sources = await liveSources(job, tests);
  for (const source of sources) await checkSource(job, source);
  for (const source of sources) await scanSource(job, source, tests, findings);
  const kept = sources.map(relative);
  if (!kept.includes("")) await excludeAllBut(job.directory, "", kept, findings.lines);
  for (const folder of findings.boundaries) {
    if (!kept.includes(folder)) await excludeAllBut(job.directory, folder, kept, findings.lines);
  }
  return { lines: [...findings.lines], sockets: findings.sockets.length, firstSocket: findings.sockets[0] };
}

function planTests(patterns: readonly string[], lines: Set<string>): Tests {
  const tests: Tests = { silent: [], loud: [] };
  for (const pattern of [LOST_AND_FOUND, ...patterns]) {
    const native = nativeExcludeLines(pattern);
    for (const line of native ?? []) lines.add(line);
    const list = native === undefined ? tests.loud : tests.silent;
    list.push(...(list.length === 0 ? [] : ["-o"]), ...findTests(pattern));
  }
  return tests;
}

/** Sources that no pattern excludes, by their own name or that of a folder above: tar asks for both. */
async function liveSources(job: ArchiveJob, { silent, loud }: Tests): Promise<string[]> {
  const sources = job.sources.map(toBytes);
  const names = new Map(sources.map((source) => [source, ancestors(source)]));
  const excluded = new Set<string>();
  const any = ["(", ...silent, ...(loud.length === 0 ? [] : ["-o", ...loud]), ")"];
  const args = [...new Set([...names.values()].flat()), "-maxdepth", "0", ...any, "-printf", "%p\\0"];
  await runFind(job, args, (record) => excluded.add(record));
  return sources.filter((source) => !names.get(source)?.some((name) => excluded.has(name)));
}

/** mksquashfs gets no source by name and would not miss one. */
async function checkSource(job: ArchiveJob, source: string): Promise<void> {
  const path = `${toBytes(job.directory)}/${source}`;
  await lstat(Buffer.from(path, "latin1")).catch((cause: unknown) => {
    throw environmentError("archive", toText(path), cause);
  });
}

/** "./mnt/data/" -> ".", "./mnt", "./mnt/data", "./mnt/data/" */
function ancestors(source: string): string[] {
  const parts = source.split("/").filter((part) => part !== "");
  return [...parts.map((_part, index) => parts.slice(0, index + 1).join("/")), source];
}

async function scanSource(job: ArchiveJob, source: string, tests: Tests, findings: Findings): Promise<void> {
  let device: string | undefined;
  const loud = tests.loud.length === 0 ? [] : ["(", ...tests.loud, ")", "-prune", "-printf", "X%p\\0", "-o"];
  const expression = [
    ...["(", ...tests.silent, ")", "-prune", "-o", ...loud],
    ...["-type", "s", "-printf", "S%p\\0", "-o", "-type", "d", "-printf", "D%D %p\\0"],
  ];
  await runFind(job, [source, "-xdev", ...expression], (record) => {
    const kind = record.charAt(0);
    if (kind === "D") {
      const space = record.indexOf(" ");
      const itsDevice = record.slice(1, space);
      device ??= itsDevice;
      if (itsDevice !== device) findings.boundaries.push(relative(record.slice(space + 1)));
      return;
    }
    const path = relative(record.slice(1));
    findings.lines.add(pathExcludeLine(path));
    if (kind === "S") findings.sockets.push(path);
  });
}

/** Excludes the entries of `folder` except those that are, or lead to, one of `kept`. */
async function excludeAllBut(root: string, folder: string, kept: readonly string[], lines: Set<string>): Promise<void> {
  const prefix = folder === "" ? "" : `${folder}/`;
  const inside = kept.filter((path) => path.startsWith(prefix));
  if (inside.length === 0 && folder !== "") {
    for (const line of contentsExcludeLines(folder)) lines.add(line);
    return;
  }
  const bytes = Buffer.from(`${toBytes(root)}/${folder}`, "latin1");
  for (const entry of await readdir(bytes, { encoding: "buffer" }).catch(() => [])) {
    const path = prefix + entry.toString("latin1");
    if (inside.includes(path)) continue;
    if (inside.some((keptPath) => keptPath.startsWith(`${path}/`))) await excludeAllBut(root, path, kept, lines);
    else lines.add(pathExcludeLine(path));
  }
}

async function runFind(job: ArchiveJob, args: readonly string[], onRecord: (record: string) => void): Promise<void> {
  // Patterns are bytes here; Node would encode them again.
  const texts = args.map(toText);
  let problem: string | undefined;
  await using find = await ChildProcess.start("find", texts, {
    cwd: job.directory,
    stdio: ["ignore", "pipe"],
    onStderrLine: (line) => {
      if (!VANISHED.test(line)) problem ??= line;
    },
  });
  let rest = "";
  let isTooLong = false;
  find.stdout?.setEncoding("latin1").on("data", (text: string) => {
    const records = (rest + text).split("\0");
    rest = records.pop() ?? "";
    if (rest.length > MAX_RECORD_CHARS) isTooLong = true;
    for (const record of records) onRecord(record);
  });
  await waitForChildren([find], job.signal);
  // 1 is "could not read some folder". mksquashfs would take one whose listing breaks off for a shorter one.
  const isUsable = find.exitCode === 0 || (find.exitCode === 1 && problem === undefined);
  if (isTooLong)
    throw new ChildProcessError(`Cannot list ${JSON.stringify(job.directory)}: find printed no end of a name`);
  if (!isUsable) throw find.failure("list", job.directory, problem);
}

/** "./mnt/data/" -> "mnt/data"; the root is "" */
function relative(path: string): string {
  return path
    .split("/")
    .filter((part) => part !== "" && part !== ".")
    .join("/");
}
