// SPDX-License-Identifier: AGPL-3.0-or-later
// Readers' locks: one file, with one heartbeat, names every point that a job reads. A reader creates its file first
// and then looks for removers; a remover creates its own first and then looks for readers. At least one of the two
// sees the other.
import { randomUUID } from "node:crypto";
import { CleanupStack, errnoOf, messageOf } from "../../core/index.ts";
import { volnameOf } from "../../pve/index.ts";
import type { StoreContext } from "../context.ts";
import { explain } from "../durable.ts";
import { LockedError } from "../errors.ts";
import { inspectLock, LockFile } from "./lock-file.ts";
import { describeHolder } from "./lock-record.ts";
import { EXCLUSIVE_SUFFIX, openLocksFolder, SHARED_INFIX } from "./point-lock.ts";

/** A store that accepts no new file can still be restored from. */
const CANNOT_LOCK = new Set(["EROFS", "ENOSPC", "EDQUOT"]);

/** Whether a reader goes on, with a warning, where the store is read-only or full. */
export type LockNeed = "if possible" | "required";

/** What is locked: points of one guest, and the one whose name the lock gets. */
interface LockedPoints {
  readonly vmid: number;
  readonly top: string;
  readonly folders: ReadonlySet<string>;
}

/** A readers' lock on a point and on everything it builds on. */
export class ChainLock implements AsyncDisposable {
  readonly #file: LockFile | undefined;
  readonly #owned: CleanupStack;

  private constructor(file: LockFile | undefined, owned: CleanupStack) {
    this.#file = file;
    this.#owned = owned;
  }

  /**
   * @throws LockedError if one of the points is being removed; EnvironmentError if the lock is required and cannot be
   *   made; the reason of `signal`
   */
  static async acquire(
    context: StoreContext,
    { vmid, top, folders }: LockedPoints,
    need: LockNeed,
    signal: AbortSignal,
  ): Promise<ChainLock> {
    const what = `"${volnameOf(`${vmid}/${top}`)}"`;
    let problem: string | undefined;
    const cannotLock = (error: unknown): undefined => {
      if (need === "required" || !CANNOT_LOCK.has(errnoOf(error) ?? "")) throw error;
      problem ??= messageOf(error);
    };
    await using owned = new CleanupStack();
    const directory = await openLocksFolder(context, vmid, owned).catch(cannotLock);
    let file: LockFile | undefined;
    if (directory !== undefined) {
      const points = [...folders].sort();
      const place = { folder: directory, name: `${top}${SHARED_INFIX}${randomUUID()}`, what, points };
      file = await LockFile.acquire(place, context.timing, signal).catch(cannotLock);
      if (file !== undefined) owned.use(file);
      // Even without our own lock: a full store is where points are removed.
      const names = await explain("list", directory.path, () => directory.list());
      for (const folder of folders) {
        const name = `${folder}${EXCLUSIVE_SUFFIX}`;
        if (!names.includes(name)) continue;
        const lock = { folder: directory, name, what: `"${volnameOf(`${vmid}/${folder}`)}"` };
        const remover = await inspectLock(lock, context.timing, signal).catch(cannotLock);
        if (remover === undefined) continue;
        throw new LockedError(`Cannot read ${lock.what}: it is being removed by ${describeHolder(remover)}`);
      }
    }
    if (problem !== undefined) context.warn(`Reading ${what} without a lock: ${problem}`);
    return new ChainLock(file, owned.move());
  }

  /** @throws LockedError if the lock is lost: what was read since may be half of what it was */
  async assertHeld(): Promise<void> {
    await this.#file?.assertHeld();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}
