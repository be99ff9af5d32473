// SPDX-License-Identifier: AGPL-3.0-or-later
// Restores under way: which point is open, and the raw views of its disks.
import { CleanupStack, RequestError } from "../core/index.ts";
import { type NbdHost, openRawView, type RawView, type RawViewMechanism, sweepRawViews } from "../device/index.ts";
import { assertSound, type ChainLock, type OpenChain, type Point, type Store } from "../store/index.ts";
import { describeTellingKeys } from "./config-warnings.ts";
import { mustVouch } from "./vouch.ts";

interface RestoreEnvironment {
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
  readonly #lock: ChainLock;
  /** Open from the check to the end: what was checked is what is read. */
  readonly #chains: ReadonlyMap<string, OpenChain>;
  readonly #owned: CleanupStack;
  readonly #views = new Map<string, RawView>();

  private constructor(
    environment: RestoreEnvironment,
    point: Point,
    lock: ChainLock,
    chains: ReadonlyMap<string, OpenChain>,
    owned: CleanupStack,
  ) {
    this.#environment = environment;
    this.#point = point;
    this.#lock = lock;
    this.#chains = chains;
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
    const lock = stack.use(await store.lockChainShared(point, signal));
    const chains = new Map<string, OpenChain>();
    // All of all chains now: a restore that would fail at its last disk must not begin.
    for (const device of point.devices.keys()) {
      const chain = stack.use(await store.openChain(point, device, signal));
      for (const { file } of chain.images) await assertSound(`restore "${point.volname}"`, file, signal);
      chains.set(device, chain);
    }
    const warning = describeTellingKeys(point.volname, "qemu", await point.guestConfig());
    if (warning !== undefined) warn(warning);
    return new RestoreSession(environment, point, lock, chains, stack.move());
  }

  get sizes(): ReadonlyMap<string, { readonly size: number }> {
    return new Map([...this.#point.devices].map(([name, { virtualBytes }]) => [name, { size: virtualBytes }]));
  }

  /** Offers a disk as a raw file or block device. Asked twice for the same disk it answers with the same path. */
  async offer(device: string, signal: AbortSignal): Promise<string> {
    const known = this.#views.get(device);
    if (known !== undefined) return known.path;
    const chain = this.#chains.get(device);
    if (chain === undefined) {
      throw new RequestError(`Cannot restore "${device}" of "${this.#point.volname}": this backup has no such disk`);
    }
    await this.#lock.assertHeld();
    const { runDir, host, deviceView, warn } = this.#environment;
    const images = chain.images.map(({ file }) => file);
    const { sizeBytes } = chain;
    const options = { chain: images, sizeBytes, runDir, name: device, mechanism: deviceView, host, warn, signal };
    await using stack = new CleanupStack();
    const view = stack.use(await openRawView(options));
    await chain.assertUnchanged("everything"); // QEMU read the headers itself: they are those that were checked
    stack.move();
    this.#views.set(device, view);
    return view.path;
  }

  /**
   * Takes a raw view back. A disk that is not offered is no error: cleanup comes after failures too.
   *
   * @throws ChildProcessError if the disk was served no longer; LockedError, PointDamagedError if somebody may have
   *   changed what was read
   */
  async withdraw(device: string): Promise<void> {
    const view = this.#views.get(device);
    if (view === undefined) return;
    this.#views.delete(device);
    await using _view = view;
    await mustVouch(device, view);
    await this.#lock.assertHeld();
    await this.#chains.get(device)?.assertUnchanged("content");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await using stack = new CleanupStack();
    stack.use(this.#owned);
    for (const view of this.#views.values()) stack.use(view);
    this.#views.clear();
  }
}
