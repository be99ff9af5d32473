// SPDX-License-Identifier: AGPL-3.0-or-later
// Restores under way: which point is open, and the raw views of its disks.
import { CleanupStack, RequestError } from "../core/index.ts";
import { type NbdHost, openRawView, type RawView, type RawViewMechanism, sweepRawViews } from "../device/index.ts";
import { parseArchiveName } from "../pve/index.ts";
import { DIGEST_ORDER } from "../qcow2/index.ts";
import { assertSound, type GuestPoints, type HeldChains, type Store } from "../store/index.ts";
import { describeTellingKeys } from "./config-warnings.ts";
import { ContentCheck, notVerified } from "./content-check.ts";
import { assertStillServed } from "./still-served.ts";

interface RestoreEnvironment {
  readonly store: Store;
  /** Directory for mounts; what killed processes left in it is swept first. */
  readonly runDir: string;
  readonly host: NbdHost;
  /** How a disk is offered. */
  readonly deviceView: RawViewMechanism;
  /** Whether what is read is compared with the recorded checksums. */
  readonly isVerified: boolean;
  readonly warn: (message: string) => void;
}

/** One VM restore: holds the chain's lock and the views until it is disposed. */
export class RestoreSession implements AsyncDisposable {
  readonly #environment: RestoreEnvironment;
  /** Open and locked from the check to the end: what was checked is what is read. */
  readonly #held: HeldChains;
  readonly #owned: CleanupStack;
  readonly #views = new Map<string, RawView>();
  readonly #checks = new Map<string, ContentCheck>();

  private constructor(environment: RestoreEnvironment, held: HeldChains, owned: CleanupStack) {
    this.#environment = environment;
    this.#held = held;
    this.#owned = owned;
  }

  /** @param points of the guest; borrowed until this is disposed */
  static async open(
    environment: RestoreEnvironment,
    points: GuestPoints,
    volname: string,
    signal: AbortSignal,
  ): Promise<RestoreSession> {
    const { store, runDir, host, isVerified, warn } = environment;
    await sweepRawViews(runDir, warn, host);
    const point = await points.point(parseArchiveName(volname));
    if (point.type !== "qemu") {
      throw new RequestError(`Cannot restore "${point.volname}" as a VM: it is the backup of a container`);
    }
    await using stack = new CleanupStack();
    const held = stack.use(await store.holdChains(points, volname, signal));
    // All images of all chains, now: a restore that would fail at its last disk must not begin.
    for (const { images } of held.chains.values()) {
      for (const { file, header } of images) await assertSound(`restore "${point.volname}"`, file, signal, header);
    }
    const warning = describeTellingKeys(point.volname, "qemu", await point.guestConfig());
    if (warning !== undefined) warn(warning);
    if (!isVerified) warn(notVerified(point.volname));
    return new RestoreSession(environment, held, stack.move());
  }

  get sizes(): ReadonlyMap<string, { readonly size: number }> {
    return new Map([...this.#held.point.devices].map(([name, { virtualBytes }]) => [name, { size: virtualBytes }]));
  }

  /** Offers a disk as a raw file or block device. A second request for the same disk gets the same path. */
  async offer(device: string, signal: AbortSignal): Promise<string> {
    const known = this.#views.get(device);
    if (known !== undefined) return known.path;
    const chain = this.#held.chains.get(device);
    if (chain === undefined) {
      throw new RequestError(
        `Cannot restore "${device}" of "${this.#held.point.volname}": this backup has no such disk`,
      );
    }
    await this.#held.assertHeld();
    const { runDir, host, deviceView, warn } = this.#environment;
    const { files, sizeBytes } = chain;
    const options = { chain: files, sizeBytes, runDir, name: device, mechanism: deviceView, host, warn, signal };
    await using stack = new CleanupStack();
    const view = stack.use(await openRawView(options));
    await chain.assertUnchanged("everything"); // QEMU read the headers itself: they are those that were checked
    stack.move();
    this.#views.set(device, view);
    if (this.#environment.isVerified) {
      const { checksums } = chain;
      const recorded = files.map((file, at) => ({ file, digest: checksums[at], order: DIGEST_ORDER }));
      this.#checks.set(device, new ContentCheck(device, recorded, warn));
    }
    return view.path;
  }

  /**
   * Takes a raw view back. A disk that is not offered is not an error: cleanup also follows failures.
   *
   * @throws ChildProcessError if the disk was no longer served; PointDamagedError if a file is not what was written;
   *   LockedError, PointDamagedError if what was read may have been changed
   */
  async withdraw(device: string): Promise<void> {
    const view = this.#views.get(device);
    if (view === undefined) return;
    this.#views.delete(device);
    await using _view = view;
    await using _check = this.#checks.get(device);
    await assertStillServed(device, view);
    await this.#held.assertHeld();
    await this.#held.chains.get(device)?.assertUnchanged("content");
    await this.#checks.get(device)?.finish();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await using stack = new CleanupStack();
    stack.use(this.#owned);
    for (const view of this.#views.values()) stack.use(view);
    for (const check of this.#checks.values()) stack.use(check);
    this.#views.clear();
  }
}
