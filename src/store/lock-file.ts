// SPDX-License-Identifier: AGPL-3.0-or-later
// A lock as a file on the share itself: made atomically, kept alive by a heartbeat, broken only when
// its holder is dead. lock-record.ts decides what dead means.
import { randomUUID } from "node:crypto";
import { constants } from "node:fs";
import { link, lstat, open, rename, rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { environmentError, errnoOf } from "../core/index.ts";
import { FILE_MODE } from "./durable.ts";
import { LockedError } from "./errors.ts";
import { TEMP_PREFIX } from "./layout.ts";
import {
  createLockRecord,
  describeHolder,
  encodeLockRecord,
  heldHere,
  isSameLock,
  isStale,
  type LockRecord,
  type LockTiming,
  readLock,
  readLockFrom,
  type SeenLock,
} from "./lock-record.ts";

const MAX_ATTEMPTS = 8;
/** A breaker that took the wrong file puts it back within moments. */
const VANISHED_GRACE_MS = 500;
const CREATE_FLAGS = constants.O_RDWR | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;

export class LockFile implements AsyncDisposable {
  readonly path: string;
  /** Names the locked thing in messages: "guest 100". */
  readonly what: string;
  readonly #record: LockRecord;
  readonly #lost = new AbortController();
  readonly #timer: NodeJS.Timeout;
  #heartbeat = 0;
  #beating: Promise<void> | undefined;
  #isReleased = false;

  private constructor(path: string, what: string, record: LockRecord, timing: LockTiming) {
    this.path = path;
    this.what = what;
    this.#record = record;
    this.#timer = setInterval(() => {
      this.#beating ??= this.#beat().finally(() => {
        this.#beating = undefined;
      });
    }, timing.heartbeatMs);
    this.#timer.unref();
  }

  /**
   * Takes the lock, or fails at once while somebody alive holds it. Watching a lock that a dead host
   * may have left takes `timing.observeMs`.
   *
   * @throws LockedError naming the holder; EnvironmentError; the abort reason of `signal`
   */
  static async acquire(path: string, what: string, timing: LockTiming, signal: AbortSignal): Promise<LockFile> {
    const record = await createLockRecord();
    heldHere.add(record.uuid);
    try {
      return await LockFile.#acquire(path, what, record, timing, signal);
    } catch (error) {
      heldHere.delete(record.uuid);
      throw error;
    }
  }

  static async #acquire(
    path: string,
    what: string,
    record: LockRecord,
    timing: LockTiming,
    signal: AbortSignal,
  ): Promise<LockFile> {
    for (let attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
      signal.throwIfAborted();
      if (await tryCreate(path, record)) return new LockFile(path, what, record, timing);
      const holder = await inspectLock(path, timing, signal);
      if (holder !== undefined) {
        throw new LockedError(`Cannot lock ${what}: it is in use by ${describeHolder(holder)}`, {
          hint: "wait until that one ends",
        });
      }
    }
    throw new LockedError(`Cannot lock ${what}: the lock changes hands too quickly, try again later`);
  }

  /** Aborts when the lock turns out to be lost; the reason is a LockedError. */
  get lost(): AbortSignal {
    return this.#lost.signal;
  }

  /**
   * Asks the share whether the lock is still ours.
   *
   * @throws LockedError if it was released, taken over or removed
   */
  async assertHeld(): Promise<void> {
    this.#lost.signal.throwIfAborted();
    if (this.#isReleased) throw new LockedError(`Cannot go on with ${this.what}: its lock was released`);
    const seen = await readLock(this.path);
    if (seen?.record?.uuid !== this.#record.uuid) {
      const state = seen === undefined ? "its lock file is gone" : `it was taken over by ${describeHolder(seen)}`;
      this.#lost.abort(new LockedError(`Cannot go on with ${this.what}: ${state}`));
      this.#lost.signal.throwIfAborted();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isReleased) return;
    this.#isReleased = true;
    clearInterval(this.#timer);
    await this.#beating;
    // A share that went away must not turn a finished backup into a failed one; the lock dies with us.
    const seen = await readLock(this.path).catch(() => undefined);
    if (seen?.record?.uuid === this.#record.uuid) await rm(this.path, { force: true }).catch(() => undefined);
    heldHere.delete(this.#record.uuid); // a file that could not be removed is nobody's now
  }

  /** Writes a new heartbeat. A share that does not answer is no loss yet: the next beat tries again. */
  async #beat(): Promise<void> {
    try {
      if (await this.#writeHeartbeat()) return;
      await sleep(VANISHED_GRACE_MS);
      if (!(await this.#writeHeartbeat())) await this.assertHeld();
    } catch {
      // Lost: `lost` tells it. Anything else: whoever wants to commit asks assertHeld().
    }
  }

  /** @returns false if the file is not ours; read and written through one handle, so never another's */
  async #writeHeartbeat(): Promise<boolean> {
    await using handle = await open(this.path, constants.O_RDWR | constants.O_NOFOLLOW).catch((error: unknown) => {
      if (errnoOf(error) === "ENOENT") return undefined;
      throw error;
    });
    if (handle === undefined || (await readLockFrom(handle)).record?.uuid !== this.#record.uuid) return false;
    this.#heartbeat += 1;
    const bytes = encodeLockRecord({ ...this.#record, heartbeat: this.#heartbeat });
    await handle.write(bytes, 0, bytes.length, 0);
    await handle.sync();
    return true;
  }
}

/**
 * The holder of a lock as long as it lives; a stale lock is broken on the way.
 *
 * @returns undefined if the lock is free now
 */
export async function inspectLock(
  path: string,
  timing: LockTiming,
  signal: AbortSignal,
): Promise<SeenLock | undefined> {
  const seen = await readLock(path);
  if (seen === undefined) return undefined;
  if (!(await isStale(path, seen, timing, signal))) return (await readLock(path)) === undefined ? undefined : seen;
  await breakLock(path, seen);
  return undefined;
}

/**
 * Removes the lock that was judged stale, and no other: it is moved aside first, looked at, and put
 * back if it is not the one. A holder whose lock cannot be put back finds out in assertHeld().
 */
export async function breakLock(path: string, stale: SeenLock): Promise<void> {
  const aside = join(dirname(path), `${TEMP_PREFIX}${randomUUID()}`);
  try {
    await rename(path, aside);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return; // somebody else was quicker
    throw environmentError("break the lock", path, error);
  }
  const moved = await readLock(aside);
  if (moved !== undefined && !isSameLock(moved, stale)) await link(aside, path).catch(() => undefined);
  await rm(aside, { force: true }).catch(() => undefined); // a sweep takes it later
}

/** @returns false if there is a lock already */
async function tryCreate(path: string, record: LockRecord): Promise<boolean> {
  const temp = join(dirname(path), `${TEMP_PREFIX}${randomUUID()}`);
  try {
    await createWith(temp, record);
    try {
      return await tryLink(temp, path);
    } catch (error) {
      const errno = errnoOf(error);
      const hasNoLinks = errno === "EPERM" || errno === "ENOTSUP" || errno === "EOPNOTSUPP" || errno === "ENOSYS";
      if (!hasNoLinks) throw error;
    }
    // CIFS has no hard links. Whoever reads the file half-written sees a holder it cannot name.
    await createWith(path, record);
    return true;
  } catch (error) {
    if (errnoOf(error) === "EEXIST") return false;
    throw environmentError("create the lock", path, error);
  } finally {
    await rm(temp, { force: true }).catch(() => undefined);
  }
}

async function createWith(path: string, record: LockRecord): Promise<void> {
  await using handle = await open(path, CREATE_FLAGS, FILE_MODE);
  try {
    await handle.writeFile(encodeLockRecord(record)); // finishes short writes
    await handle.sync();
  } catch (error) {
    await rm(path, { force: true }).catch(() => undefined);
    throw error;
  }
}

/** A hard link appears complete or not at all, also on NFS. */
async function tryLink(temp: string, path: string): Promise<boolean> {
  try {
    await link(temp, path);
    return true;
  } catch (error) {
    // The link was made and its reply was lost: NFS asks again, and may fail then.
    const made = await lstat(temp).catch(() => undefined);
    if (made?.nlink === 2) return true;
    if (errnoOf(error) !== "EEXIST") throw error;
    return false;
  }
}
