// SPDX-License-Identifier: AGPL-3.0-or-later
// Writes a container's file systems as one squashfs image, by mksquashfs, holding the same files as the
// tar of the same job. What the format cannot hold: ACLs (warned of), fractions of a second.

import { fstat } from "node:fs";
import { lstat } from "node:fs/promises";
import { promisify } from "node:util";
import { CleanupStack, errnoOf, toBytes, toText } from "../core/index.ts";
import { ChildProcess, onLines, waitForChildren } from "../host/index.ts";
import { checkArchiveJob, warnOfTrailingSlashes } from "./check-job.ts";
import { scanExcludes } from "./exclude-scan.ts";
import type { ArchiveCompression, ArchiveJob, ArchiveSummary } from "./job.ts";
import { pace } from "./pacing.ts";
import { ArchiveProgress, readProcessBytes } from "./progress.ts";
import { openScratchFile } from "./scratch-file.ts";
import { SquashfsMessages } from "./squashfs-messages.ts";
import { logSockets } from "./tar-messages.ts";
import { startTimer } from "./timer.ts";

const fstatAsync = promisify(fstat);
const PROGRESS_POLL_MS = 500;
/** Its default is a quarter of the host's memory; more than this made it slower. */
const MEMORY = "256M";
const ARCHIVE_FD = 3;
const EXCLUDES_FD = 4;

const COMPRESSION_FLAGS: Readonly<Record<ArchiveCompression, readonly string[]>> = {
  none: ["-noI", "-noD", "-noF", "-noX"],
  zlib: ["-comp", "gzip", "-Xcompression-level", "6"],
  zstd: ["-comp", "zstd", "-Xcompression-level", "3"],
};

/** All but the exclude file: what the speed of a plain mksquashfs is measured with. */
export function squashfsFlags(compression: ArchiveCompression): string[] {
  return ["-noappend", "-no-progress", "-no-exports", "-xattrs", "-mem", MEMORY, ...COMPRESSION_FLAGS[compression]];
}

/**
 * Writes the image to the file behind `job.archiveFd`.
 *
 * @throws ChildProcessError if find or mksquashfs fails or could not read a file that is there,
 *   EnvironmentError if the disk is full, RequestError for a wrong job, and the abort reason of `job.signal`
 */
export async function writeSquashfs(job: ArchiveJob): Promise<ArchiveSummary> {
  checkArchiveJob(job);
  warnOfTrailingSlashes(job);
  await using stack = new CleanupStack();
  const scan = await scanExcludes(job);
  const excludes = stack.use(await openScratchFile());
  await excludes.writeFile(Buffer.from(scan.lines.map((line) => `${line}\n`).join(""), "latin1"));
  const messages = new SquashfsMessages(job.log);
  const progress = new ArchiveProgress(performance.now());
  const tool = stack.use(await startTool(job, excludes.fd, messages));
  const pacing = job.bandwidthLimit > 0 ? stack.use(pace(tool, job.bandwidthLimit)) : undefined;
  const timer = stack.use(
    startTimer(PROGRESS_POLL_MS, async () => {
      const nowMs = performance.now();
      if (!progress.isDue(nowMs)) return;
      const readBytes = readProcessBytes(tool.pid) ?? 0;
      const line = progress.update({ files: messages.files, readBytes, writtenBytes: await sizeOf(job) }, nowMs);
      if (line !== undefined) job.log("info", line);
    }),
  );
  await waitForChildren([tool], job.signal);
  await pacing?.[Symbol.asyncDispose]();
  await timer[Symbol.asyncDispose]();
  await judge(tool, job, messages);
  logSockets(job.log, scan.sockets, scan.firstSocket);
  const total = { files: messages.members, readBytes: messages.sourceBytes, writtenBytes: await sizeOf(job) };
  job.log("info", progress.finish(total, performance.now()));
  const warnings = messages.warnings + scan.longPaths.report(job.log);
  return { files: total.files, bytes: total.readBytes, warnings };
}

async function startTool(job: ArchiveJob, excludesFd: number, messages: SquashfsMessages): Promise<ChildProcess> {
  const args = [
    ...[".", `/proc/self/fd/${ARCHIVE_FD}`, ...squashfsFlags(job.compression)],
    ...["-info", "-wildcards", "-ef", `/proc/self/fd/${EXCLUDES_FD}`],
  ];
  const tool = await ChildProcess.start("mksquashfs", args, {
    cwd: job.directory,
    stdio: ["ignore", "pipe", job.archiveFd, excludesFd],
    onStderrLine: (_line, bytes) => messages.addError(bytes),
  });
  if (tool.stdout !== null) onLines(tool.stdout, (line) => messages.addInfo(line));
  return tool;
}

/** mksquashfs goes on without the files that it could not read: vanished is a warning, unreadable is not. */
async function judge(tool: ChildProcess, job: ArchiveJob, messages: SquashfsMessages): Promise<void> {
  if (tool.exitCode !== 0) throw tool.failure("archive", job.directory, messages.reason);
  if (messages.unjudged !== undefined) throw tool.failure("archive", job.directory, messages.unjudged);
  for (const [path, { message, isContent }] of messages.unread) {
    const isThere = !(await hasVanished(job.directory, path));
    if (isThere && isContent) throw tool.failure("archive", job.directory, message);
    messages.warn(isThere ? message : `${toText(path)}: vanished before it was read`);
  }
  messages.close();
}

/** @param path below `directory`, as bytes. What cannot even be looked at may well be there. */
async function hasVanished(directory: string, path: string): Promise<boolean> {
  try {
    await lstat(Buffer.from(`${toBytes(directory)}/${path}`, "latin1"));
    return false;
  } catch (error) {
    const errno = errnoOf(error);
    return errno === "ENOENT" || errno === "ENOTDIR";
  }
}

async function sizeOf(job: ArchiveJob): Promise<number> {
  return (await fstatAsync(job.archiveFd)).size;
}
