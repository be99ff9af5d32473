// SPDX-License-Identifier: AGPL-3.0-or-later
// Removes what dead jobs left behind. It runs only under the guest's lock: then nothing else writes there.
import { setTimeout as sleep } from "node:timers/promises";
import { errnoOf } from "../core/index.ts";
import { Folder } from "../host/index.ts";
import { parseFolderName } from "../pve/index.ts";
import type { StoreContext } from "./context.ts";
import { explain, wordProblem } from "./durable.ts";
import {
  FAILED_LOGS_FOLDER,
  GUEST_LOCK_FILE,
  POINT_LOCKS_FOLDER,
  STAGING_PREFIX,
  TEMP_PREFIX,
  TRASH_PREFIX,
} from "./format/layout.ts";
import type { GuestLock } from "./lock/guest-lock.ts";
import { breakLock } from "./lock/lock-file.ts";
import { isHolderDead, isOfThisHost, isUnmoved, readLock, type SeenLock } from "./lock/lock-record.ts";
import { pruneFailedLogs } from "./logs.ts";
import { witnessFolder } from "./witness.ts";

/** Temporary files live for moments, but some are made without the guest's lock. */
const TEMP_FILE_MAX_AGE_MS = 60 * 60 * 1000;
/** Younger locks of other hosts are not even watched: no living holder is silent for a day. */
const POINT_LOCK_MAX_AGE_MS = 24 * 60 * 60 * 1000;

/** Does something to an entry of a directory; a failure causes a warning. */
type Attempt = (path: string, work: () => Promise<void>) => Promise<void>;

/**
 * Sweeps one guest's directory. What cannot be removed stays, with a warning: it must not stop a backup.
 *
 * @param lock asked a moment ago whether it is held
 * @throws EnvironmentError if the lock cannot be looked at; the reason of `signal`
 */
export async function sweepGuest(context: StoreContext, lock: GuestLock, signal: AbortSignal): Promise<void> {
  const { folder: guest } = lock;
  const nowMs = await serverNowMs(guest);
  const attempt: Attempt = async (path, work) => {
    try {
      await work();
    } catch (error) {
      signal.throwIfAborted();
      if (errnoOf(error) !== "ENOENT") context.warn(wordProblem("sweep", path, error).message);
    }
  };
  await attempt(guest.path, async () => {
    for (const name of await guest.list()) {
      const path = guest.pathOf(name);
      if (name.startsWith(STAGING_PREFIX) || name.startsWith(TRASH_PREFIX)) {
        await attempt(path, () => guest.remove(name));
      } else if (parseFolderName(lock.vmid, name) !== undefined) {
        await attempt(path, () => within(guest, name, (folder) => sweepTempFiles(folder, nowMs)));
      }
    }
    await sweepTempFiles(guest, nowMs);
  });
  await attempt(guest.pathOf(POINT_LOCKS_FOLDER), () =>
    within(guest, POINT_LOCKS_FOLDER, (folder) => sweepPointLocks(context, folder, nowMs, signal)),
  );
  await attempt(guest.pathOf(FAILED_LOGS_FOLDER), () =>
    within(guest, FAILED_LOGS_FOLDER, (folder) => pruneFailedLogs(folder, nowMs)),
  );
  await attempt(context.storeid, async () => {
    const path = await witnessFolder(context);
    await attempt(path, async () => {
      await using witnesses = await Folder.open(path);
      await sweepTempFiles(witnesses, Date.now()); // another file system, another clock
    });
  });
}

/** The server's clock, at the last heartbeat. */
async function serverNowMs(guest: Folder): Promise<number> {
  const path = guest.pathOf(GUEST_LOCK_FILE);
  const found = await explain("look at", path, () => guest.look(GUEST_LOCK_FILE));
  return found?.mtimeMs ?? Date.now(); // the lock was lost just now: the commit will find out
}

async function within(parent: Folder, name: string, work: (folder: Folder) => Promise<void>): Promise<void> {
  await using folder = await parent.openFolder(name);
  await work(folder);
}

async function sweepTempFiles(folder: Folder, nowMs: number): Promise<void> {
  for (const name of (await folder.list()).filter((one) => one.startsWith(TEMP_PREFIX))) {
    const found = await folder.look(name);
    const isOld = found !== undefined && nowMs - found.mtimeMs > TEMP_FILE_MAX_AGE_MS;
    if (isOld && found.kind !== "folder") await folder.removeFile(name);
  }
}

/**
 * Locks of this host are judged by the process table. Those of others are watched first: a server's clock may have
 * jumped.
 */
async function sweepPointLocks(
  context: StoreContext,
  folder: Folder,
  nowMs: number,
  signal: AbortSignal,
): Promise<void> {
  await sweepTempFiles(folder, nowMs);
  const silent = new Map<string, SeenLock>();
  for (const name of (await folder.list()).filter((one) => !one.startsWith(TEMP_PREFIX))) {
    const seen = await readLock(folder, name);
    if (seen === undefined || seen.problem !== undefined) continue;
    if (await isOfThisHost(seen)) {
      if (await isHolderDead(seen)) await breakLock(folder, name, seen);
    } else if (nowMs - seen.mtimeMs > POINT_LOCK_MAX_AGE_MS) {
      silent.set(name, seen);
    }
  }
  if (silent.size === 0) return;
  await sleep(context.timing.observeMs, undefined, { signal }).catch(() => signal.throwIfAborted());
  for (const [name, seen] of silent) if (await isUnmoved(folder, name, seen)) await breakLock(folder, name, seen);
}
