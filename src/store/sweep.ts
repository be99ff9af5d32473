// SPDX-License-Identifier: AGPL-3.0-or-later
// Removes what jobs that died left behind. Only under the guest's lock: then nobody writes there.
import { lstat, readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { environmentError, errnoOf } from "../core/index.ts";
import type { StoreContext } from "./context.ts";
import type { GuestLock } from "./guest-lock.ts";
import {
  FAILED_LOGS_FOLDER,
  guestFolder,
  POINT_LOCKS_FOLDER,
  parseFolderName,
  STAGING_PREFIX,
  TEMP_PREFIX,
  TRASH_PREFIX,
} from "./layout.ts";
import { breakLock } from "./lock-file.ts";
import { isHolderDead, isOfThisHost, readLock } from "./lock-record.ts";
import { pruneFailedLogs } from "./logs.ts";
import { witnessFolder } from "./witness.ts";

/** Temporary files live for moments, but some are made without the guest's lock. */
const TEMP_FILE_MAX_AGE_MS = 60 * 60 * 1000;
/** No living holder is silent for a day. */
const POINT_LOCK_MAX_AGE_MS = 24 * 60 * 60 * 1000;

/**
 * Sweeps one guest's folder. What cannot be removed is warned of and left: it must not stop a backup.
 *
 * @throws LockedError if `lock` is not held any more
 */
export async function sweepGuest(context: StoreContext, lock: GuestLock): Promise<void> {
  await lock.assertHeld();
  const folder = guestFolder(context.path, lock.vmid);
  const { mtimeMs: nowMs } = await lstat(lock.path).catch((error: unknown) => {
    throw environmentError("look at", lock.path, error);
  }); // the server's clock, at the last heartbeat
  const attempt = async (what: string, work: () => Promise<void>): Promise<void> => {
    try {
      await work();
    } catch (error) {
      if (errnoOf(error) !== "ENOENT") context.warn(environmentError("sweep", what, error).message);
    }
  };
  await attempt(folder, async () => {
    for (const name of await readdir(folder)) {
      const path = join(folder, name);
      if (name.startsWith(STAGING_PREFIX) || name.startsWith(TRASH_PREFIX)) {
        await attempt(path, () => rm(path, { recursive: true, force: true }));
      } else if (parseFolderName(lock.vmid, name) !== undefined) {
        await attempt(path, () => sweepTempFiles(path, nowMs));
      }
    }
    await sweepTempFiles(folder, nowMs);
  });
  const locks = join(folder, POINT_LOCKS_FOLDER);
  await attempt(locks, () => sweepPointLocks(locks, nowMs));
  await attempt(join(folder, FAILED_LOGS_FOLDER), () => pruneFailedLogs(join(folder, FAILED_LOGS_FOLDER), nowMs));
  await attempt(context.storeid, async () => {
    const witnesses = await witnessFolder(context);
    await attempt(witnesses, () => sweepTempFiles(witnesses, Date.now())); // another file system, another clock
  });
}

async function sweepTempFiles(folder: string, nowMs: number): Promise<void> {
  if (!(await lstat(folder)).isDirectory()) return;
  for (const name of (await readdir(folder)).filter((one) => one.startsWith(TEMP_PREFIX))) {
    const path = join(folder, name);
    const found = await lstat(path).catch(() => undefined);
    if (found !== undefined && nowMs - found.mtimeMs > TEMP_FILE_MAX_AGE_MS) await rm(path, { force: true });
  }
}

async function sweepPointLocks(folder: string, nowMs: number): Promise<void> {
  await sweepTempFiles(folder, nowMs);
  for (const name of (await readdir(folder)).filter((one) => !one.startsWith(TEMP_PREFIX))) {
    const path = join(folder, name);
    const seen = await readLock(path);
    if (seen === undefined) continue;
    // A clock that jumps forward must not end a reader that can be seen to live.
    const isDead = (await isOfThisHost(seen)) ? await isHolderDead(seen) : nowMs - seen.mtimeMs > POINT_LOCK_MAX_AGE_MS;
    if (isDead) await breakLock(path, seen);
  }
}
