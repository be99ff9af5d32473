// SPDX-License-Identifier: AGPL-3.0-or-later
// Writes a container's file systems as a tar archive, by GNU tar, as PVE's own vzdump does. Without a
// bandwidth limit no byte passes this process: tar writes to the file or to the compressor.

import { fstat, write } from "node:fs";
import type { FileHandle } from "node:fs/promises";
import type { Writable } from "node:stream";
import { promisify } from "node:util";
import { Throttle } from "../block/index.ts";
import { CleanupStack } from "../core/index.ts";
import { ChildProcess, waitForChildren } from "../host/index.ts";
import { checkArchiveJob, warnOfTrailingSlashes } from "./check-job.ts";
import { type Compressor, findCompressor } from "./compressor.ts";
import type { ArchiveCompression, ArchiveJob, ArchiveSummary } from "./job.ts";
import { findLongPaths, LONG_PATH_PATTERN } from "./long-paths.ts";
import { tarExcludeFlags } from "./patterns.ts";
import { type KernelPipe, tryCreatePipe } from "./pipe.ts";
import { ArchiveProgress, readProcessBytes } from "./progress.ts";
import { LineCounter, openScratchFile } from "./scratch-file.ts";
import { TarMessages } from "./tar-messages.ts";
import { startTimer } from "./timer.ts";

const writeAsync = promisify(write);
const fstatAsync = promisify(fstat);
const PROGRESS_POLL_MS = 500;
/** Of 512 bytes: records of 256 KiB. With tar's 10 KiB half of its time goes into write(). */
const BLOCKS_PER_RECORD = 512;
const INDEX_FD = 3;

/** What a tar of a container has to carry; PVE unpacks with the counterpart. */
const TAR_FLAGS = [
  "--create",
  "--file=-",
  "--one-file-system",
  "--no-unquote",
  "--preserve-permissions",
  "--sparse",
  "--numeric-owner",
  "--acls",
  "--xattrs",
  "--xattrs-include=user.*",
  "--xattrs-include=security.capability",
  "--warning=no-xattr-write",
];

/** What we need besides, for counting and for speed. */
const OWN_FLAGS = [
  `--blocking-factor=${BLOCKS_PER_RECORD}`,
  "--totals",
  // One line per member: a name with a newline must not make two.
  "--verbose",
  "--quoting-style=escape",
  `--index-file=/proc/self/fd/${INDEX_FD}`,
];

/** Arguments of a plain GNU tar that archives the same to its stdout. */
export function tarFlags(job: Pick<ArchiveJob, "directory" | "sources" | "excludePatterns">): string[] {
  return [
    ...[...TAR_FLAGS, `--directory=${job.directory}`, ...tarExcludeFlags(job.excludePatterns)],
    ...[`--exclude=${LONG_PATH_PATTERN}`, ...job.sources],
  ];
}

/** The name PVE's rules accept for a restore. */
export function tarFileName(compression: ArchiveCompression): "archive.tar" | "archive.tar.gz" | "archive.tar.zst" {
  if (compression === "none") return "archive.tar";
  return compression === "zlib" ? "archive.tar.gz" : "archive.tar.zst";
}

/**
 * Writes the archive to `job.archiveFd`. Files that vanish or change while they are read are warnings.
 *
 * @throws ChildProcessError if tar or the compressor fails, EnvironmentError if the disk is full, RequestError
 *   for a wrong job, and the abort reason of `job.signal`; no child is left behind then
 */
export async function writeTar(job: ArchiveJob): Promise<ArchiveSummary> {
  checkArchiveJob(job);
  warnOfTrailingSlashes(job);
  const longPaths = await findLongPaths(job);
  await using stack = new CleanupStack();
  const index = stack.use(await openScratchFile());
  const messages = new TarMessages(job.log);
  const chain = await startChain(job, index, messages, stack);
  const counter = new LineCounter(index);
  const progress = new ArchiveProgress(performance.now());
  const counters = async () => ({
    files: await counter.count(),
    readBytes: messages.totalBytes ?? readProcessBytes(chain.tar.pid) ?? 0,
    writtenBytes: (await fstatAsync(job.archiveFd)).size,
  });
  const timer = stack.use(
    startTimer(PROGRESS_POLL_MS, async () => {
      const nowMs = performance.now();
      const line = progress.isDue(nowMs) ? progress.update(await counters(), nowMs) : undefined;
      if (line !== undefined) job.log("info", line);
    }),
  );
  await finishChain(chain, job, messages);
  await timer[Symbol.asyncDispose]();
  messages.close();
  const total = await counters();
  job.log("info", progress.finish(total, performance.now()));
  const warnings = messages.warnings + longPaths.report(job.log);
  return { files: total.files, bytes: total.readBytes, warnings };
}

interface Chain {
  readonly tar: ChildProcess;
  readonly compressor: ChildProcess | undefined;
  /** Ends when all data has passed this process; resolves to its error. Undefined where none passes. */
  readonly pumped: Promise<unknown> | undefined;
}

async function startChain(
  job: ArchiveJob,
  index: FileHandle,
  messages: TarMessages,
  stack: CleanupStack,
): Promise<Chain> {
  const compressor = await findCompressor(job.compression, job.log);
  const isDirect = job.bandwidthLimit <= 0;
  using pipe = isDirect && compressor !== undefined ? tryCreatePipe() : undefined;
  const isPumped = !isDirect || (compressor !== undefined && pipe === undefined);
  const started = await startCompressor(compressor, pipe, job);
  if (started !== undefined) stack.use(started);
  const output = isPumped ? "pipe" : (pipe?.writeFd ?? job.archiveFd);
  const tar = stack.use(
    await ChildProcess.start("tar", [...OWN_FLAGS, ...tarFlags(job)], {
      stdio: ["ignore", output, index.fd],
      onStderrLine: (line) => messages.add(line),
    }),
  );
  const pumped = isPumped ? pump(tar, started, job).catch((error: unknown) => error ?? null) : undefined;
  return { tar, compressor: started, pumped };
}

async function startCompressor(compressor: Compressor | undefined, pipe: KernelPipe | undefined, job: ArchiveJob) {
  if (compressor === undefined) return undefined;
  return ChildProcess.start(compressor.command, compressor.args, { stdio: [pipe?.readFd ?? "pipe", job.archiveFd] });
}

/** Passes tar's output on at no more than the limit. The limit is on what is read, so before compression. */
async function pump(tar: ChildProcess, compressor: ChildProcess | undefined, job: ArchiveJob): Promise<undefined> {
  const throttle = new Throttle(job.bandwidthLimit);
  const sink = compressor?.stdin ?? undefined;
  sink?.on("error", () => undefined); // the write that fails tells it
  // Leaving this loop in any way destroys the stream: tar then ends by SIGPIPE and does not wait for a reader.
  for await (const chunk of (tar.stdout ?? []) as AsyncIterable<Buffer>) {
    await throttle.pass(chunk.byteLength, job.signal);
    if (sink === undefined) await writeFully(job.archiveFd, chunk);
    else await writeTo(sink, chunk);
  }
  sink?.end();
  return undefined;
}

/** A compressor that has ended makes no event of it: only its writes fail. */
function writeTo(sink: Writable, chunk: Buffer): Promise<void> {
  return new Promise((resolve, reject) => {
    sink.write(chunk, (error) => (error == null ? resolve() : reject(error)));
  });
}

async function writeFully(fd: number, chunk: Buffer): Promise<void> {
  for (let done = 0; done < chunk.byteLength; ) {
    done += (await writeAsync(fd, chunk, done, chunk.byteLength - done, null)).bytesWritten;
  }
}

async function finishChain(chain: Chain, job: ArchiveJob, messages: TarMessages): Promise<void> {
  const { tar, compressor, pumped } = chain;
  await waitForChildren([tar], job.signal);
  const pumpError = await pumped;
  job.signal.throwIfAborted();
  if (compressor !== undefined) {
    await waitForChildren([compressor], job.signal);
    // Before tar: a compressor that dies takes tar with it.
    if (compressor.exitCode !== 0) throw compressor.failure("compress", tarFileName(job.compression));
  }
  if (pumpError !== undefined) throw pumpError;
  // 1 is "some files differ": vanished or changed while read, already told as warnings.
  if (tar.exitCode !== 0 && tar.exitCode !== 1) throw tar.failure("archive", job.directory, messages.reason);
}
