// SPDX-License-Identifier: AGPL-3.0-or-later
// A point that is being read: the chains of its devices, open and locked. Each file is opened and checked once, and
// that open file is read until the end.
import { CleanupStack } from "../core/index.ts";
import { isSameFile } from "../host/index.ts";
import type { ArchiveName } from "../pve/index.ts";
import { type OpenChain, openChain } from "./chain.ts";
import type { StoreContext } from "./context.ts";
import { PointDamagedError } from "./errors.ts";
import { MANIFEST_FILE } from "./format/layout.ts";
import type { GuestPoints } from "./guest-points.ts";
import { damagedFile, unreadableFile } from "./image-file.ts";
import { ChainLock, type LockNeed } from "./lock/chain-lock.ts";
import type { Point } from "./point.ts";

interface LockRequest {
  readonly point: Point;
  readonly chains: ReadonlyMap<string, OpenChain>;
  readonly need: LockNeed;
  readonly signal: AbortSignal;
}

export class HeldChains implements AsyncDisposable {
  readonly point: Point;
  /** By device. */
  readonly chains: ReadonlyMap<string, OpenChain>;
  /** The point, and everything that it builds on. Top first. */
  readonly names: readonly ArchiveName[];
  readonly #points: GuestPoints;
  readonly #chainLock: ChainLock;
  readonly #owned: CleanupStack;

  private constructor(
    points: GuestPoints,
    parts: Pick<HeldChains, "point" | "chains" | "names">,
    lock: ChainLock,
    owned: CleanupStack,
  ) {
    this.point = parts.point;
    this.chains = parts.chains;
    this.names = parts.names;
    this.#points = points;
    this.#chainLock = lock;
    this.#owned = owned;
  }

  /**
   * Opens the chains of all devices of a point and locks them.
   *
   * @param points outlives this
   * @throws as openChain() and hold()
   */
  static async open(
    context: StoreContext,
    points: GuestPoints,
    point: Point,
    need: LockNeed,
    signal: AbortSignal,
  ): Promise<HeldChains> {
    await using owned = new CleanupStack();
    const chains = new Map<string, OpenChain>();
    for (const device of point.devices.keys()) {
      chains.set(device, owned.use(await openChain(points, point, device, signal)));
    }
    return await HeldChains.#lock(context, points, { point, chains, need, signal }, owned.move());
  }

  /**
   * Locks chains that are open and remain the caller's; then looks again, because a part of them may have been
   * removed between opening and locking.
   *
   * @throws LockedError if one of the points is being removed; PointDamagedError if one was changed meanwhile;
   *   EnvironmentError
   */
  static async hold(
    context: StoreContext,
    points: GuestPoints,
    point: Point,
    chains: ReadonlyMap<string, OpenChain>,
    need: LockNeed,
    signal: AbortSignal,
  ): Promise<HeldChains> {
    return await HeldChains.#lock(context, points, { point, chains, need, signal }, new CleanupStack());
  }

  /** @param owned belongs to what is returned */
  static async #lock(
    context: StoreContext,
    points: GuestPoints,
    { point, chains, need, signal }: LockRequest,
    owned: CleanupStack,
  ): Promise<HeldChains> {
    await using stack = owned;
    const names = new Map<string, ArchiveName>([[point.folderName, point]]);
    for (const chain of chains.values()) for (const name of chain.points) names.set(name.folderName, name);
    const locked = { vmid: point.vmid, top: point.folderName, folders: new Set(names.keys()) };
    const lock = stack.use(await ChainLock.acquire(context, locked, need, signal));
    signal.throwIfAborted();
    const held = new HeldChains(points, { point, chains, names: [...names.values()] }, lock, stack.move());
    try {
      await held.assertInPlace();
      return held;
    } catch (error) {
      await held[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** @throws LockedError if the lock is lost: what was read since may be half of what it was */
  async assertHeld(): Promise<void> {
    await this.#chainLock.assertHeld();
  }

  /**
   * Checks that the names still lead to what is open here and to the manifests that were read; nothing is read again.
   *
   * @throws PointDamagedError naming what is missing or was replaced; EnvironmentError
   */
  async assertInPlace(): Promise<void> {
    for (const name of this.names) await this.#assertPointInPlace(name);
    for (const chain of this.chains.values()) await chain.assertInPlace();
  }

  async #assertPointInPlace(name: ArchiveName): Promise<void> {
    const path = this.#points.pathOf(name);
    const changed = (): PointDamagedError => damagedFile(path, "it was removed or replaced while it was in use");
    try {
      if (!(await this.#points.isInPlace(name))) throw changed();
      const entry = await this.#points.entry(name);
      if (entry?.kind !== "complete") return;
      const { manifestFile: before } = entry;
      const now = await (await this.#points.folder(name)).look(MANIFEST_FILE);
      const isSame = now !== undefined && isSameFile(now, before) && now.mtimeMs === before.mtimeMs;
      if (!isSame || now.sizeBytes !== before.sizeBytes) throw changed();
    } catch (error) {
      throw error instanceof PointDamagedError ? error : unreadableFile(path, error);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}
