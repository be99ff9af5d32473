// SPDX-License-Identifier: AGPL-3.0-or-later
// GNU find on the sources of a job, leaving what tar would leave out. It reads names and types only: a fraction of a
// second for 100,000 files.
import { ChildProcessError, toBytes, toText } from "../core/index.ts";
import { ChildProcess, waitForChildren } from "../host/index.ts";
import type { ArchiveJob } from "./job.ts";
import { findTests, LOST_AND_FOUND, nativeExcludeLines } from "./patterns.ts";

/** Longer than any record: below a path of the limit there may be a name of 255 bytes, and find adds a type. */
const MAX_RECORD_CHARS = 8_192;
/** What find says of something that went away meanwhile: no reason to fail. */
const VANISHED = /: (?:No such file or directory|Not a directory)$/;

/** The tests of the exclude patterns, joined by -o. */
export interface ExcludeTests {
  /** Patterns that mksquashfs understands. */
  readonly silent: readonly string[];
  /** Patterns that reach mksquashfs as the paths that find found. */
  readonly loud: readonly string[];
}

/** @param onNative gets the lines by which mksquashfs is told of the silent patterns */
export function planTests(job: ArchiveJob, onNative: (line: string) => void = () => undefined): ExcludeTests {
  const tests = { silent: [] as string[], loud: [] as string[] };
  for (const pattern of [LOST_AND_FOUND, ...job.excludePatterns.map(toBytes)]) {
    const native = nativeExcludeLines(pattern);
    native?.forEach(onNative);
    const list = native === undefined ? tests.loud : tests.silent;
    list.push(...(list.length === 0 ? [] : ["-o"]), ...findTests(pattern));
  }
  return tests;
}

/** All tests as one expression. */
export function anyOf({ silent, loud }: ExcludeTests): string[] {
  return ["(", ...silent, ...(loud.length === 0 ? [] : ["-o", ...loud]), ")"];
}

/** Sources that no pattern excludes, by their own name or that of a directory above: tar asks for both. */
export async function liveSources(job: ArchiveJob, tests: ExcludeTests, unreadable: Unreadable): Promise<string[]> {
  const sources = job.sources.map(toBytes);
  const names = new Map(sources.map((source) => [source, ancestors(source)]));
  const excluded = new Set<string>();
  const args = [...new Set([...names.values()].flat()), "-maxdepth", "0", ...anyOf(tests), "-printf", "%p\\0"];
  await runFind(job, args, unreadable, (record) => excluded.add(record));
  return sources.filter((source) => !names.get(source)?.some((name) => excluded.has(name)));
}

/** "./mnt/data/" -> ".", "./mnt", "./mnt/data", "./mnt/data/" */
function ancestors(source: string): string[] {
  const parts = source.split("/").filter((part) => part !== "");
  return [...parts.map((_part, index) => parts.slice(0, index + 1).join("/")), source];
}

/** Whether a directory that cannot be listed fails the job here, or is left to the archiver, which fails too. */
type Unreadable = "fails" | "is left to the archiver";

/**
 * Runs find in the directory of the job. Texts are bytes ("latin1").
 *
 * @param args starting points, then an expression that ends each record with a NUL
 * @throws ChildProcessError if find cannot run, or cannot list a directory and that fails; the reason of the job's signal
 */
export async function runFind(
  job: ArchiveJob,
  args: readonly string[],
  unreadable: Unreadable,
  onRecord: (record: string) => void,
): Promise<void> {
  // Node would encode the bytes again.
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
  // 1 is "could not read some directory". mksquashfs would take one whose listing breaks off for a shorter one.
  const isTold = problem !== undefined && unreadable === "fails";
  const isUsable = find.exitCode === 0 || (find.exitCode === 1 && !isTold);
  if (isTooLong)
    throw new ChildProcessError(`Cannot list ${JSON.stringify(job.directory)}: find printed a name without an end`);
  if (!isUsable) throw find.failure("list", job.directory, problem);
}

/** "./mnt/data/" -> "mnt/data"; the root is "" */
export function relativePath(path: string): string {
  return path
    .split("/")
    .filter((part) => part !== "" && part !== ".")
    .join("/");
}
