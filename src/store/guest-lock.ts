// SPDX-License-Identifier: AGPL-3.0-or-later
// The writer's lock of one guest. Whoever writes points, removes points or sweeps leftovers holds it.
import { join } from "node:path";
import { checkSameStore } from "./catalog.ts";
import type { StoreContext } from "./context.ts";
import { makeFolder } from "./durable.ts";
import { LockedError } from "./errors.ts";
import { GUEST_LOCK_FILE, guestFolder } from "./layout.ts";
import { LockFile } from "./lock-file.ts";

/** Held from the start of a backup to its commit. Disposing releases it. */
export class GuestLock implements AsyncDisposable {
  readonly vmid: number;
  readonly #file: LockFile;

  private constructor(vmid: number, file: LockFile) {
    this.vmid = vmid;
    this.#file = file;
  }

  /**
   * Takes the lock or fails at once; only a lock that a dead host may have left is watched for a while.
   *
   * @throws LockedError naming the holder; StoreUnavailableError, also if another file system is at the path now;
   *   EnvironmentError; the reason of `signal`
   */
  static async acquire(context: StoreContext, vmid: number, signal: AbortSignal): Promise<GuestLock> {
    const folder = guestFolder(context.path, vmid);
    await checkSameStore(context);
    await makeFolder(folder);
    const path = join(folder, GUEST_LOCK_FILE);
    return new GuestLock(vmid, await LockFile.acquire(path, `guest ${vmid}`, context.timing, signal));
  }

  get path(): string {
    return this.#file.path;
  }

  /** Aborts with a LockedError when somebody took the lock over or removed it. */
  get lost(): AbortSignal {
    return this.#file.lost;
  }

  /** @throws LockedError unless the share says that the lock is still ours */
  async assertHeld(): Promise<void> {
    await this.#file.assertHeld();
  }

  /** What a job failed with: if the lock was lost meanwhile, that is why, else `error` itself. Never rejects. */
  async causeOf(error: unknown): Promise<unknown> {
    return await this.assertHeld().then(
      () => error,
      (lost: unknown) => (lost instanceof LockedError ? lost : error),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#file[Symbol.asyncDispose]();
  }
}
