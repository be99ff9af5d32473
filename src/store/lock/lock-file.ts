// SPDX-License-Identifier: AGPL-3.0-or-later
// A lock as a file on the share itself: made atomically, kept alive by a heartbeat, broken only when
// its holder is dead. lock-record.ts decides what dead means.
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { errnoOf } from "../../core/index.ts";
import type { Folder } from "../../host/index.ts";
import { wordProblem } from "../durable.ts";
import { LockedError } from "../errors.ts";
import { TEMP_PREFIX } from "../format/layout.ts";
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

/** Where a lock is, and what it locks. */
interface LockPlace {
  /** Borrowed for as long as the lock is held. */
  readonly folder: Folder;
  readonly name: string;
  /** For messages: "guest 100". */
  readonly what: string;
  /** For a readers' lock: directories of the points it covers. */
  readonly points?: readonly string[];
}

export class LockFile implements AsyncDisposable {
  readonly name: string;
  /** Names the locked thing in messages: "guest 100". */
  readonly what: string;
  readonly #folder: Folder;
  readonly #record: LockRecord;
  readonly #lost = new AbortController();
  readonly #timer: NodeJS.Timeout;
  #heartbeat = 0;
  #beating: Promise<void> | undefined;
  #isReleased = false;

  private constructor({ folder, name, what }: LockPlace, record: LockRecord, timing: LockTiming) {
    this.#folder = folder;
    this.name = name;
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
   * Takes the lock, or fails at once while a living process holds it. Watching a lock that a dead host may have left
   * takes `timing.observeMs`.
   *
   * @throws LockedError naming the holder; EnvironmentError; the abort reason of `signal`
   */
  static async acquire(place: LockPlace, timing: LockTiming, signal: AbortSignal): Promise<LockFile> {
    const record = await createLockRecord(place.points);
    heldHere.add(record.uuid);
    try {
      return await LockFile.#acquire(place, record, timing, signal);
    } catch (error) {
      heldHere.delete(record.uuid);
      throw error;
    }
  }

  static async #acquire(
    place: LockPlace,
    record: LockRecord,
    timing: LockTiming,
    signal: AbortSignal,
  ): Promise<LockFile> {
    const { folder, name, what } = place;
    for (let attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
      signal.throwIfAborted();
      if (await tryCreate(folder, name, record)) return new LockFile(place, record, timing);
      const holder = await inspectLock(place, timing, signal);
      if (holder !== undefined) {
        throw new LockedError(`Cannot lock ${what}: it is in use by ${describeHolder(holder)}`, {
          hint: "wait until it ends",
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
    if (this.#isReleased) throw new LockedError(`Cannot continue with ${this.what}: its lock was released`);
    const seen = await readLock(this.#folder, this.name);
    if (seen?.record?.uuid !== this.#record.uuid) {
      const state = seen === undefined ? "its lock file is gone" : `its lock was taken over by ${describeHolder(seen)}`;
      this.#lost.abort(new LockedError(`Cannot continue with ${this.what}: ${state}`));
      this.#lost.signal.throwIfAborted();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isReleased) return;
    this.#isReleased = true;
    clearInterval(this.#timer);
    await this.#beating;
    // A share that went away must not turn a finished backup into a failed one; the lock dies with us.
    const seen = await readLock(this.#folder, this.name).catch(() => undefined);
    if (seen?.record?.uuid === this.#record.uuid) await this.#folder.removeFile(this.name).catch(() => undefined);
    heldHere.delete(this.#record.uuid); // a file that could not be removed has no holder now
  }

  /** Writes a new heartbeat. While a share does not answer, the lock is not lost yet: the next beat tries again. */
  async #beat(): Promise<void> {
    try {
      if (await this.#writeHeartbeat()) return;
      await sleep(VANISHED_GRACE_MS);
      if (!(await this.#writeHeartbeat())) await this.assertHeld();
    } catch {
      // `lost` reports the loss of the lock. After any other failure the commit asks assertHeld().
    }
  }

  /** @returns false if the file is not ours; read and written through one handle, so never another holder's */
  async #writeHeartbeat(): Promise<boolean> {
    await using file = await this.#folder.openForUpdate(this.name).catch((error: unknown) => {
      if (errnoOf(error) === "ENOENT") return undefined;
      throw error;
    });
    if (file === undefined) return false;
    const { handle } = file;
    if ((await readLockFrom(handle)).record?.uuid !== this.#record.uuid) return false;
    this.#heartbeat += 1;
    const bytes = encodeLockRecord({ ...this.#record, heartbeat: this.#heartbeat });
    await handle.write(bytes, 0, bytes.length, 0);
    await handle.sync();
    return true;
  }
}

/**
 * The holder of a lock while it lives; a stale lock is broken on the way.
 *
 * @returns undefined if the lock is free now
 * @throws LockedError if what has its name is not a file; EnvironmentError; the abort reason of `signal`
 */
export async function inspectLock(
  { folder, name, what }: LockPlace,
  timing: LockTiming,
  signal: AbortSignal,
): Promise<SeenLock | undefined> {
  const seen = await readLock(folder, name);
  if (seen === undefined) return undefined;
  if (seen.problem !== undefined) {
    throw new LockedError(`Cannot lock ${what}: "${folder.pathOf(name)}" is not a lock: ${seen.problem}`, {
      hint: "this software did not create it: remove it",
    });
  }
  if (!(await isStale(folder, name, seen, timing, signal))) {
    return (await readLock(folder, name)) === undefined ? undefined : seen;
  }
  await breakLock(folder, name, seen);
  return undefined;
}

/**
 * Removes the lock that was judged stale, and no other: it is first moved aside, inspected, and put back if it is
 * another one. A holder whose lock cannot be put back finds out in assertHeld().
 */
export async function breakLock(folder: Folder, name: string, stale: SeenLock): Promise<void> {
  const aside = `${TEMP_PREFIX}${randomUUID()}`;
  try {
    await folder.rename(name, folder, aside);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return; // another process was quicker
    throw wordProblem("break the lock", folder.pathOf(name), error);
  }
  const moved = await readLock(folder, aside);
  if (moved !== undefined && !isSameLock(moved, stale))
    await putBack(folder, aside, name, moved).catch(() => undefined);
  await folder.removeFile(aside).catch(() => undefined); // a sweep takes it later
}

/**
 * Does nothing if there is a new lock already. A holder recognizes its lock by the content, so a copy will do where
 * there are no links.
 */
async function putBack(folder: Folder, aside: string, name: string, { record }: SeenLock): Promise<void> {
  try {
    await folder.link(aside, name);
  } catch (error) {
    if (hasNoLinks(error) && record !== undefined) await createWith(folder, name, record);
  }
}

/** @returns false if there is a lock already */
async function tryCreate(folder: Folder, name: string, record: LockRecord): Promise<boolean> {
  const temp = `${TEMP_PREFIX}${randomUUID()}`;
  try {
    await createWith(folder, temp, record);
    try {
      return await tryLink(folder, temp, name);
    } catch (error) {
      if (!hasNoLinks(error)) throw error;
    }
    // A reader of the half-written file sees a holder that it cannot name.
    await createWith(folder, name, record);
    return true;
  } catch (error) {
    if (errnoOf(error) === "EEXIST") return false;
    throw wordProblem("create the lock", folder.pathOf(name), error);
  } finally {
    await folder.removeFile(temp).catch(() => undefined);
  }
}

/** CIFS, for one, has no hard links. */
function hasNoLinks(error: unknown): boolean {
  return ["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"].includes(errnoOf(error) ?? "");
}

async function createWith(folder: Folder, name: string, record: LockRecord): Promise<void> {
  await using handle = await folder.createFile(name);
  try {
    await handle.writeFile(encodeLockRecord(record)); // finishes short writes
    await handle.sync();
  } catch (error) {
    await folder.removeFile(name).catch(() => undefined);
    throw error;
  }
}

/** A hard link appears complete or not at all, also on NFS. */
async function tryLink(folder: Folder, temp: string, name: string): Promise<boolean> {
  try {
    await folder.link(temp, name);
    return true;
  } catch (error) {
    // The link was made and its reply was lost: NFS then asks again, and that may fail.
    const made = await folder.look(temp).catch(() => undefined);
    if (made?.links === 2) return true;
    if (errnoOf(error) !== "EEXIST") throw error;
    return false;
  }
}
