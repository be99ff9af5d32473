// SPDX-License-Identifier: AGPL-3.0-or-later
// Task logs: one beside each point, and those of failed jobs for a bounded time. Bounded in size and count.
import { environmentError, messageOf, RequestError } from "../core/index.ts";
import { FileProblem, type Folder, openRegularFile, readInto } from "../host/index.ts";
import { formatArchiveName, type PointType } from "../pve/index.ts";
import { checkSameStore, type StoreContext } from "./context.ts";
import { openOrMakeFolder, wordProblem } from "./durable.ts";
import { FAILED_LOGS_FOLDER, LOG_FILE } from "./format/layout.ts";
import { openPointFolder, type Point } from "./point.ts";

const MAX_LOG_BYTES = 4 * 1024 * 1024;
const MAX_FAILED_LOGS = 20;
const MAX_FAILED_LOG_AGE_MS = 30 * 24 * 60 * 60 * 1000;
/** This much of the beginning of a log that is too long is kept; the rest is its end. */
const HEAD_BYTES = 1024 * 1024;
const CUT_MARK = Buffer.from("\n[... cut: the log was too long ...]\n");
const FAILED_LOG_PATTERN = /^(?:qemu|lxc)-[0-9]{1,12}\.log$/;

/** Copies a task log beside a point. @throws EnvironmentError, RequestError */
export async function storeLog(context: StoreContext, point: Point, path: string): Promise<void> {
  const bytes = await readLog(path);
  await using folder = await openPointFolder(context, point);
  await context.io.replaceFile(folder, LOG_FILE, bytes);
}

/** Keeps the task log of a job that made no point. @throws StoreUnavailableError, EnvironmentError, RequestError */
export async function keepFailedLog(
  context: StoreContext,
  job: { readonly vmid: number; readonly type: PointType; readonly epoch: number },
  path: string,
): Promise<void> {
  const { folderName } = formatArchiveName(job.vmid, job.type, job.epoch);
  const bytes = await readLog(path);
  await checkSameStore(context);
  await using guest = await openOrMakeFolder(context.folder, String(job.vmid));
  await using folder = await openOrMakeFolder(guest, FAILED_LOGS_FOLDER);
  const kept = `${folderName}.log`;
  await context.io.replaceFile(folder, kept, bytes);
  try {
    const nowMs = (await folder.look(kept))?.mtimeMs; // by the server's clock
    if (nowMs !== undefined) await pruneFailedLogs(folder, nowMs);
  } catch (error) {
    throw wordProblem("clear up", folder.path, error);
  }
}

/** Removes the oldest logs beyond the limits of count and age; throws the system's error. */
export async function pruneFailedLogs(folder: Folder, nowMs: number): Promise<void> {
  const logs: Array<{ name: string; mtimeMs: number }> = [];
  for (const name of (await folder.list()).filter((one) => FAILED_LOG_PATTERN.test(one))) {
    const found = await folder.look(name);
    if (found?.kind === "file") logs.push({ name, mtimeMs: found.mtimeMs });
  }
  logs.sort((a, b) => b.mtimeMs - a.mtimeMs);
  for (const [at, { name, mtimeMs }] of logs.entries()) {
    if (at >= MAX_FAILED_LOGS || nowMs - mtimeMs > MAX_FAILED_LOG_AGE_MS) await folder.removeFile(name);
  }
}

/** A log, or its beginning and its end if it is too long. */
async function readLog(path: string): Promise<Buffer> {
  try {
    await using file = await openRegularFile(path);
    const { handle, fileBytes: size } = file;
    const read = async (start: number, length: number): Promise<Buffer> => {
      const bytes = Buffer.alloc(length);
      return bytes.subarray(0, await readInto(handle, bytes, start));
    };
    if (size <= MAX_LOG_BYTES) return await read(0, size);
    const tailBytes = MAX_LOG_BYTES - HEAD_BYTES - CUT_MARK.length;
    return Buffer.concat([await read(0, HEAD_BYTES), CUT_MARK, await read(size - tailBytes, tailBytes)]);
  } catch (error) {
    if (error instanceof FileProblem) throw new RequestError(`Cannot keep log "${path}": ${messageOf(error)}`);
    throw environmentError("read", path, error);
  }
}
