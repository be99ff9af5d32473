// SPDX-License-Identifier: AGPL-3.0-or-later
// Restores under way: which point is open, and the raw views of its disks.
import { CleanupStack, RequestError } from "../core/index.ts";
import { openRawView, type RawView, sweepRawViews } from "../device/index.ts";
import type { Point, Store } from "../store/index.ts";
import { assertSound } from "./sound-image.ts";

/** One VM restore: holds the chain's lock and the views until it is disposed. */
export class RestoreSession implements AsyncDisposable {
  readonly #store: Store;
  readonly #point: Point;
  readonly #runDir: string;
  readonly #owned: CleanupStack;
  readonly #views = new Map<string, RawView>();

  private constructor(store: Store, point: Point, runDir: string, owned: CleanupStack) {
    this.#store = store;
    this.#point = point;
    this.#runDir = runDir;
    this.#owned = owned;
  }

  /** @param runDir folder for mounts; what killed processes left in it is swept first */
  static async open(
    store: Store,
    volname: string,
    runDir: string,
    warn: (message: string) => void,
    signal: AbortSignal,
  ): Promise<RestoreSession> {
    await sweepRawViews(runDir, warn);
    const point = await store.openPoint(volname, signal);
    if (point.type !== "qemu") {
      throw new RequestError(`Cannot restore "${point.volname}" as a VM: it is the backup of a container`);
    }
    await using stack = new CleanupStack();
    stack.use(await store.lockChainShared(point, signal));
    // All of all chains now: a restore that would fail at its last disk must not begin. The store has looked
    // into legacy images itself: others wrote them, and leaks are no damage there.
    for (const device of point.devices.keys()) {
      const { paths } = await store.resolveChain(point, device, signal);
      if (point.kind === "legacy") continue;
      for (const image of paths) await assertSound(`restore "${point.volname}"`, image, signal);
    }
    return new RestoreSession(store, point, runDir, stack.move());
  }

  get sizes(): ReadonlyMap<string, { readonly size: number }> {
    return new Map([...this.#point.devices].map(([name, { virtualBytes }]) => [name, { size: virtualBytes }]));
  }

  /** Offers a disk as a raw file. Asked twice for the same disk it answers with the same file. */
  async offer(device: string, signal: AbortSignal): Promise<string> {
    const known = this.#views.get(device);
    if (known !== undefined) return known.path;
    if (!this.#point.devices.has(device)) {
      throw new RequestError(`Cannot restore "${device}" of "${this.#point.volname}": this backup has no such disk`);
    }
    const { paths, sizeBytes } = await this.#store.resolveChain(this.#point, device, signal);
    const view = await openRawView({ chain: paths, sizeBytes, runDir: this.#runDir, name: device, signal });
    this.#views.set(device, view);
    return view.path;
  }

  /** Takes a raw file back. A disk that is not offered is no error: cleanup comes after failures too. */
  async withdraw(device: string): Promise<void> {
    const view = this.#views.get(device);
    this.#views.delete(device);
    await view?.[Symbol.asyncDispose]();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await using stack = new CleanupStack();
    stack.use(this.#owned);
    for (const view of this.#views.values()) stack.use(view);
    this.#views.clear();
  }
}
