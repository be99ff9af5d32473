// SPDX-License-Identifier: AGPL-3.0-or-later
// Writes a container's archive into an open file, in a process that PVE's forked child started: the container is
// mounted there, and it is in the container's user namespace. The process that owns the store does the rest.
import { readFile } from "node:fs/promises";
import { tarFileName, writeSquashfs, writeTar } from "../../archive/index.ts";
import type { LogFunction } from "../../core/index.ts";
import { EnvironmentError, RequestError } from "../../core/index.ts";
import type { ContainerBackupInfo } from "../../provider/index.ts";
import type { DirectoryConfig } from "../config.ts";
import { HandoffChannel } from "./container-handoff.ts";
import { formatCommit } from "./container-messages.ts";

export type ContainerFormat = Pick<DirectoryConfig, "lxcMode" | "compression">;

interface ArchiverJob {
  readonly format: ContainerFormat;
  readonly info: ContainerBackupInfo;
  readonly excludePatterns: readonly string[];
  readonly log: LogFunction;
  readonly signal: AbortSignal;
}

export function containerArchiveName({ lxcMode, compression }: ContainerFormat): string {
  return lxcMode === "squashfs" ? "archive.sqfs" : tarFileName(compression);
}

/**
 * Writes the archive, asks the process that owns the store to commit it, and passes on the log lines of that process.
 *
 * @param handles numbers of the open archive, and of the connection to the process that owns the store
 * @throws the error of tar or mksquashfs; EnvironmentError with what the other process says; the reason of the job's
 *   signal
 */
export async function archiveContainer(
  job: ArchiverJob,
  [archiveFd, handoffFd]: readonly number[],
  guestConfig: Buffer,
): Promise<void> {
  if (archiveFd === undefined || handoffFd === undefined) {
    throw new RequestError("Cannot back up the container: expected the handles of its archive and of the connection");
  }
  const { excludePatterns, format, info, log } = job;
  using channel = HandoffChannel.inherit(handoffFd);
  const over = new AbortController();
  const answer = awaitAnswer(channel, log);
  answer.catch((error: unknown) => over.abort(error)); // there would be no process to commit the archive
  const signal = AbortSignal.any([job.signal, over.signal]);
  const write = format.lxcMode === "squashfs" ? writeSquashfs : writeTar;
  const summary = await write({
    directory: info.directory,
    sources: info.sources,
    excludePatterns,
    compression: format.compression,
    bandwidthLimit: info.bandwidthLimit,
    archiveFd,
    inUserNamespace: await isInUserNamespace(),
    log,
    signal,
  });
  signal.throwIfAborted();
  channel.send(formatCommit({ summary, guestConfig }));
  await Promise.race([answer, rejectOnAbort(job.signal)]);
}

/** The first namespace maps every id to itself. Source: user_namespaces(7), /proc/pid/uid_map. */
async function isInUserNamespace(): Promise<boolean> {
  const map = await readFile("/proc/self/uid_map", "latin1");
  return map.trim().split(/\s+/).join(" ") !== "0 0 4294967295";
}

function rejectOnAbort(signal: AbortSignal): Promise<never> {
  return new Promise((_resolve, reject) => {
    const abort = (): void => reject(signal.reason);
    if (signal.aborted) abort();
    else signal.addEventListener("abort", abort, { once: true });
  });
}

/** Reads until `ok`; logs what comes before. */
async function awaitAnswer(channel: HandoffChannel, log: LogFunction): Promise<void> {
  for (;;) {
    const message = await channel.next();
    if (message === undefined) {
      throw new EnvironmentError("Cannot finish the backup: the process that commits it has ended");
    }
    if (message.ok === true) return;
    if (Array.isArray(message.log)) {
      const [level, text] = message.log as unknown[];
      log(level === "warn" || level === "err" ? level : "info", String(text));
    } else if (typeof message.error === "object" && message.error !== null) {
      const { message: text, hint } = message.error as { message?: unknown; hint?: unknown };
      throw new EnvironmentError(String(text), typeof hint === "string" ? { hint } : {});
    }
  }
}
