// SPDX-License-Identifier: AGPL-3.0-or-later
// Task logs: one beside each point, and those of failed jobs for a bounded time. Bounded in size and count.
import { lstat, readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { environmentError, messageOf, RequestError } from "../core/index.ts";
import { checkSameStore } from "./catalog.ts";
import type { StoreContext } from "./context.ts";
import { makeFolder } from "./durable.ts";
import { JsonProblem, openRegular } from "./json.ts";
import { FAILED_LOGS_FOLDER, formatArchiveName, guestFolder, LOG_FILE, type PointType } from "./layout.ts";
import type { Point } from "./point.ts";

export const MAX_LOG_BYTES = 4 * 1024 * 1024;
export const MAX_FAILED_LOGS = 20;
const MAX_FAILED_LOG_AGE_MS = 30 * 24 * 60 * 60 * 1000;
/** Of a log that is too long, the beginning keeps this much; the rest is its end. */
const HEAD_BYTES = 1024 * 1024;
const CUT_MARK = Buffer.from("\n[... cut: the log was too long ...]\n");
const FAILED_LOG_PATTERN = /^(?:qemu|lxc)-[0-9]{1,12}\.log$/;

/** Copies a task log beside a point. @throws EnvironmentError, RequestError */
export async function storeLog(context: StoreContext, point: Pick<Point, "folder">, path: string): Promise<void> {
  await context.io.replaceFile(join(point.folder, LOG_FILE), await readLog(path));
}

/** Keeps the task log of a job that made no point. @throws StoreUnavailableError, EnvironmentError, RequestError */
export async function keepFailedLog(
  context: StoreContext,
  job: { readonly vmid: number; readonly type: PointType; readonly epoch: number },
  path: string,
): Promise<void> {
  const { folderName } = formatArchiveName(job.vmid, job.type, job.epoch);
  const bytes = await readLog(path);
  const parent = guestFolder(context.path, job.vmid);
  await checkSameStore(context);
  await makeFolder(parent);
  const folder = join(parent, FAILED_LOGS_FOLDER);
  await makeFolder(folder);
  const kept = join(folder, `${folderName}.log`);
  await context.io.replaceFile(kept, bytes);
  try {
    await pruneFailedLogs(folder, (await lstat(kept)).mtimeMs);
  } catch (error) {
    throw environmentError("clear up", folder, error);
  }
}

/** Removes the oldest logs beyond the limits of count and age; throws the system's error. */
export async function pruneFailedLogs(folder: string, nowMs: number): Promise<void> {
  const logs: Array<{ path: string; mtimeMs: number }> = [];
  for (const name of (await readdir(folder)).filter((one) => FAILED_LOG_PATTERN.test(one))) {
    const path = join(folder, name);
    const found = await lstat(path).catch(() => undefined);
    if (found?.isFile()) logs.push({ path, mtimeMs: found.mtimeMs });
  }
  logs.sort((a, b) => b.mtimeMs - a.mtimeMs);
  for (const [at, { path, mtimeMs }] of logs.entries()) {
    if (at >= MAX_FAILED_LOGS || nowMs - mtimeMs > MAX_FAILED_LOG_AGE_MS) await rm(path, { force: true });
  }
}

/** A log, or its beginning and its end where it is too long. */
async function readLog(path: string): Promise<Buffer> {
  try {
    await using handle = await openRegular(path);
    const { size } = await handle.stat();
    const read = async (start: number, length: number): Promise<Buffer> => {
      const bytes = Buffer.alloc(length);
      let filled = 0;
      while (filled < length) {
        const { bytesRead } = await handle.read(bytes, filled, length - filled, start + filled);
        if (bytesRead === 0) break;
        filled += bytesRead;
      }
      return bytes.subarray(0, filled);
    };
    if (size <= MAX_LOG_BYTES) return await read(0, size);
    const tailBytes = MAX_LOG_BYTES - HEAD_BYTES - CUT_MARK.length;
    return Buffer.concat([await read(0, HEAD_BYTES), CUT_MARK, await read(size - tailBytes, tailBytes)]);
  } catch (error) {
    if (error instanceof JsonProblem) throw new RequestError(`Cannot keep log "${path}": ${messageOf(error)}`);
    throw environmentError("read", path, error);
  }
}
