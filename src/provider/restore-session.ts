// SPDX-License-Identifier: AGPL-3.0-or-later
// Restores under way: which point is open, and the raw views of its disks.
import { CleanupStack, RequestError } from "../core/index.ts";
import { type NbdHost, openRawView, type RawView, type RawViewMechanism, sweepRawViews } from "../device/index.ts";
import { assertSound, type Point, type Store } from "../store/index.ts";
import { mustVouch } from "./vouch.ts";

export interface RestoreEnvironment {
  readonly store: Store;
  /** Folder for mounts; what killed processes left in it is swept first. */
  readonly runDir: string;
  readonly host: NbdHost;
  /** How a disk is offered. */
  readonly deviceView: RawViewMechanism;
  readonly warn: (message: string) => void;
}

/** One VM restore: holds the chain's lock and the views until it is disposed. */
export class RestoreSession implements AsyncDisposable {
  readonly #environment: RestoreEnvironment;
  readonly #point: Point;
  readonly #owned: CleanupStack;
  readonly #views = new Map<string, RawView>();

  private constructor(environment: RestoreEnvironment, point: Point, owned: CleanupStack) {
    this.#environment = environment;
    this.#point = point;
    this.#owned = owned;
  }

  static async open(environment: RestoreEnvironment, volname: string, signal: AbortSignal): Promise<RestoreSession> {
    const { store, runDir, host, warn } = environment;
    await sweepRawViews(runDir, warn, host);
    const point = await store.openPoint(volname, signal);
    if (point.type !== "qemu") {
      throw new RequestError(`Cannot restore "${point.volname}" as a VM: it is the backup of a container`);
    }
    await using stack = new CleanupStack();
    stack.use(await store.lockChainShared(point, signal));
    // All of all chains now: a restore that would fail at its last disk must not begin.
    for (const device of point.devices.keys()) {
      const { paths } = await store.resolveChain(point, device, signal);
      for (const image of paths) await assertSound(`restore "${point.volname}"`, image, signal);
    }
    return new RestoreSession(environment, point, stack.move());
  }

  get sizes(): ReadonlyMap<string, { readonly size: number }> {
    return new Map([...this.#point.devices].map(([name, { virtualBytes }]) => [name, { size: virtualBytes }]));
  }

  /** Offers a disk as a raw file or block device. Asked twice for the same disk it answers with the same path. */
  async offer(device: string, signal: AbortSignal): Promise<string> {
    const known = this.#views.get(device);
    if (known !== undefined) return known.path;
    if (!this.#point.devices.has(device)) {
      throw new RequestError(`Cannot restore "${device}" of "${this.#point.volname}": this backup has no such disk`);
    }
    const { store, runDir, host, deviceView, warn } = this.#environment;
    const { paths, sizeBytes } = await store.resolveChain(this.#point, device, signal);
    const options = { chain: paths, sizeBytes, runDir, name: device, mechanism: deviceView, host, warn, signal };
    const view = await openRawView(options);
    this.#views.set(device, view);
    return view.path;
  }

  /**
   * Takes a raw view back. A disk that is not offered is no error: cleanup comes after failures too.
   *
   * @throws ChildProcessError if the disk was served no longer
   */
  async withdraw(device: string): Promise<void> {
    const view = this.#views.get(device);
    if (view === undefined) return;
    this.#views.delete(device);
    await using _view = view;
    await mustVouch(device, view);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await using stack = new CleanupStack();
    stack.use(this.#owned);
    for (const view of this.#views.values()) stack.use(view);
    this.#views.clear();
  }
}
