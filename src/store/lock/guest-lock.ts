// SPDX-License-Identifier: AGPL-3.0-or-later
// The writer's lock of one guest. A process that writes points, removes points or sweeps leftovers holds it.
import { CleanupStack } from "../../core/index.ts";
import type { Folder } from "../../host/index.ts";
import { checkVmid } from "../../pve/index.ts";
import { checkSameStore, type StoreContext } from "../context.ts";
import { openOrMakeFolder } from "../durable.ts";
import { LockedError } from "../errors.ts";
import { GUEST_LOCK_FILE } from "../format/layout.ts";
import { LockFile } from "./lock-file.ts";

/** Held from the start of a backup to its commit. Disposing releases it. */
export class GuestLock implements AsyncDisposable {
  readonly vmid: number;
  /** The guest's directory, as long as the lock is held. */
  readonly folder: Folder;
  readonly #file: LockFile;
  readonly #owned: CleanupStack;

  private constructor(vmid: number, folder: Folder, file: LockFile, owned: CleanupStack) {
    this.vmid = vmid;
    this.folder = folder;
    this.#file = file;
    this.#owned = owned;
  }

  /**
   * Takes the lock or fails at once; only a lock that a dead host may have left is watched for a while.
   *
   * @throws LockedError naming the holder; StoreUnavailableError, also if another file system is at the path now;
   *   EnvironmentError; the reason of `signal`
   */
  static async acquire(context: StoreContext, vmid: number, signal: AbortSignal): Promise<GuestLock> {
    checkVmid(vmid);
    await checkSameStore(context);
    await using owned = new CleanupStack();
    const folder = owned.use(await openOrMakeFolder(context.folder, String(vmid)));
    const place = { folder, name: GUEST_LOCK_FILE, what: `guest ${vmid}` };
    const file = owned.use(await LockFile.acquire(place, context.timing, signal));
    return new GuestLock(vmid, folder, file, owned.move());
  }

  /** Aborts with a LockedError when another process took the lock over or removed it. */
  get lost(): AbortSignal {
    return this.#file.lost;
  }

  /** @throws LockedError unless the share says that the lock is still ours */
  async assertHeld(): Promise<void> {
    await this.#file.assertHeld();
  }

  /** Why a job failed: the loss of the lock if it was lost meanwhile, else `error` itself. Never rejects. */
  async causeOf(error: unknown): Promise<unknown> {
    return await this.assertHeld().then(
      () => error,
      (lost: unknown) => (lost instanceof LockedError ? lost : error),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}
