// SPDX-License-Identifier: AGPL-3.0-or-later
// Finds what tar would leave out, for mksquashfs, which knows neither tar's patterns nor several sources:
// excluded paths, sockets, paths too long to restore, and the contents of file systems that are not a source.
import { lstat, readdir } from "node:fs/promises";
import { environmentError, toBytes, toText } from "../core/index.ts";
import { type ExcludeTests, liveSources, planTests, relativePath, runFind } from "./find.ts";
import type { ArchiveJob } from "./job.ts";
import { LONG_PATH_PATTERN, LongPathLines, LongPaths } from "./long-paths.ts";
import { contentsExcludeLines, pathExcludeLine } from "./patterns.ts";

interface ExcludeScan {
  /** Lines of an exclude file for `mksquashfs -wildcards`, as bytes ("latin1"). */
  readonly lines: readonly string[];
  readonly sockets: number;
  readonly firstSocket: string | undefined;
  readonly longPaths: LongPaths;
}

interface Findings {
  readonly lines: Set<string>;
  sockets: number;
  firstSocket: string | undefined;
  /** Directories on another device than their source. */
  readonly boundaries: string[];
  readonly longPaths: LongPaths;
  readonly longPathLines: LongPathLines;
}

/** @throws ChildProcessError if find cannot run or cannot list a directory; EnvironmentError for a source that is missing */
export async function scanExcludes(job: ArchiveJob): Promise<ExcludeScan> {
  const findings: Findings = {
    lines: new Set(),
    sockets: 0,
    firstSocket: undefined,
    boundaries: [],
    longPaths: new LongPaths(),
    longPathLines: new LongPathLines(),
  };
  const tests = planTests(job, (line) => findings.lines.add(line));
  const sources = await liveSources(job, tests, "fails");
  for (const source of sources) await checkSource(job, source);
  for (const source of sources) await scanSource(job, source, tests, findings);
  const kept = sources.map(relativePath);
  if (!kept.includes("")) await excludeAllBut(job.directory, "", kept, findings.lines);
  for (const folder of findings.boundaries) {
    if (!kept.includes(folder)) await excludeAllBut(job.directory, folder, kept, findings.lines);
  }
  const { lines, sockets, firstSocket, longPaths } = findings;
  return { lines: [...lines], sockets, firstSocket, longPaths };
}

/** mksquashfs gets no source by name and would not miss one. */
async function checkSource(job: ArchiveJob, source: string): Promise<void> {
  const path = `${toBytes(job.directory)}/${source}`;
  await lstat(Buffer.from(path, "latin1")).catch((cause: unknown) => {
    throw environmentError("archive", toText(path), cause);
  });
}

async function scanSource(job: ArchiveJob, source: string, tests: ExcludeTests, findings: Findings): Promise<void> {
  let device: string | undefined;
  const loud = tests.loud.length === 0 ? [] : ["(", ...tests.loud, ")", "-prune", "-printf", "X%p\\0", "-o"];
  const expression = [
    ...["(", ...tests.silent, ")", "-prune", "-o", ...loud],
    ...["-path", LONG_PATH_PATTERN, "-prune", "-printf", "L%p\\0", "-o"],
    ...["-type", "s", "-printf", "S%p\\0", "-o", "-type", "d", "-printf", "D%D %p\\0"],
  ];
  await runFind(job, [source, "-xdev", ...expression], "fails", (record) => {
    const kind = record.charAt(0);
    if (kind === "D") {
      const space = record.indexOf(" ");
      const itsDevice = record.slice(1, space);
      device ??= itsDevice;
      if (itsDevice !== device) findings.boundaries.push(relativePath(record.slice(space + 1)));
      return;
    }
    const path = relativePath(record.slice(1));
    if (kind === "L") {
      findings.longPaths.add(record.slice(1));
      for (const line of findings.longPathLines.add(path)) findings.lines.add(line);
      return;
    }
    findings.lines.add(pathExcludeLine(path));
    if (kind === "S" && findings.sockets++ === 0) findings.firstSocket = path;
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
