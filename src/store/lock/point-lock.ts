// SPDX-License-Identifier: AGPL-3.0-or-later
// Locks on single points: many readers, or one remover. Both sides create their own file first and look
// for the other's afterwards, so that at least one of two at the same time sees the other.
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { CleanupStack, errnoOf, messageOf } from "../../core/index.ts";
import type { Folder } from "../../host/index.ts";
import { checkVmid, volnameOf } from "../../pve/index.ts";
import { openChain } from "../chain.ts";
import type { StoreContext } from "../context.ts";
import { explain, openOrMakeFolder } from "../durable.ts";
import { LockedError } from "../errors.ts";
import { POINT_LOCKS_FOLDER } from "../format/layout.ts";
import type { Point } from "../point.ts";
import { inspectLock, LockFile } from "./lock-file.ts";
import { describeHolder, type SeenLock } from "./lock-record.ts";

const ATTRIBUTES_WAIT_MS = 10_000;
const ATTRIBUTES_POLL_MS = 50;

/** A store that takes no new file can still be restored from. */
const CANNOT_LOCK = new Set(["EROFS", "ENOSPC", "EDQUOT"]);

/** Whether a reader goes on, with a warning, where the store is read-only or full. */
export type LockNeed = "if possible" | "required";

/**
 * Readers' lock on a point and on everything it builds on.
 *
 * @throws LockedError if one of them is being removed; PointDamagedError if the chain is not whole;
 *   EnvironmentError if the lock is required and cannot be made
 */
export async function lockChainShared(
  context: StoreContext,
  point: Point,
  signal: AbortSignal,
  need: LockNeed,
): Promise<ChainLock> {
  await using owned = new CleanupStack();
  const locks: LockFile[] = [];
  let problem: string | undefined;
  const cannotLock = (error: unknown): void => {
    if (need === "required" || !CANNOT_LOCK.has(errnoOf(error) ?? "")) throw error;
    problem ??= messageOf(error);
  };
  const folders = await foldersOfChain(context, point, signal);
  const locksFolder = await openLocksFolder(context, point.vmid, owned).catch(cannotLock);
  for (const folderName of folders) {
    if (locksFolder === undefined) break;
    const lock = await lockShared(context, locksFolder, { ...point, folderName }, cannotLock, signal);
    if (lock !== undefined) locks.push(owned.use(lock));
  }
  if (problem !== undefined) context.warn(`Reading "${point.volname}" without a lock: ${problem}`);
  // Between looking and locking somebody may have removed a part of it.
  await foldersOfChain(context, point, signal);
  return new ChainLock(locks, owned.move());
}

/** Readers' locks on the points of a chain. */
export class ChainLock implements AsyncDisposable {
  readonly #locks: readonly LockFile[];
  readonly #owned: CleanupStack;

  constructor(locks: readonly LockFile[], owned: CleanupStack) {
    this.#locks = locks;
    this.#owned = owned;
  }

  /** @throws LockedError if somebody took one for dead: what was read since may be half of what it was */
  async assertHeld(): Promise<void> {
    for (const lock of this.#locks) await lock.assertHeld();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

/**
 * Remover's lock on one point; the caller holds the guest's lock too.
 *
 * @throws LockedError while anybody reads the point or something that builds on it
 */
export async function lockPointExclusive(
  context: StoreContext,
  point: { readonly vmid: number; readonly folderName: string },
  signal: AbortSignal,
): Promise<AsyncDisposable> {
  const { vmid, folderName } = point;
  const what = describe(vmid, folderName);
  await using held = new CleanupStack();
  const folder = await openLocksFolder(context, vmid, held);
  const place = { folder, name: exclusiveName(folderName), what };
  held.use(await LockFile.acquire(place, context.timing, signal));
  const names = await explain("list", folder.path, () => folder.list());
  for (const name of names.filter((one) => one.startsWith(sharedPrefix(folderName)))) {
    const holder = await inspectLock(folder, name, context.timing, signal);
    if (holder !== undefined) {
      throw new LockedError(`Cannot lock ${what}: it is being read by ${describeHolder(holder)}`);
    }
  }
  return held.move();
}

/** For the moments of a change of attributes; waits for others who change them too. */
export async function lockAttributes(
  context: StoreContext,
  point: { readonly vmid: number; readonly folderName: string },
  signal: AbortSignal,
): Promise<AsyncDisposable> {
  await using held = new CleanupStack();
  const folder = await openLocksFolder(context, point.vmid, held);
  const what = `the attributes of ${describe(point.vmid, point.folderName)}`;
  const place = { folder, name: `${point.folderName}.attributes`, what };
  const endMs = performance.now() + ATTRIBUTES_WAIT_MS;
  for (;;) {
    try {
      held.use(await LockFile.acquire(place, context.timing, signal));
      return held.move();
    } catch (error) {
      if (!(error instanceof LockedError) || performance.now() > endMs) throw error;
      await sleep(ATTRIBUTES_POLL_MS, undefined, { signal }).catch(() => signal.throwIfAborted());
    }
  }
}

async function foldersOfChain(context: StoreContext, point: Point, signal: AbortSignal): Promise<Set<string>> {
  const folders = new Set([point.folderName]);
  for (const device of point.devices.keys()) {
    await using chain = await openChain(context, point, device, signal);
    for (const folder of chain.folders) folders.add(folder);
  }
  return folders;
}

/**
 * @param cannotLock takes what kept the lock from being made, and throws it on if that must not be
 * @returns undefined where it could not be made
 */
async function lockShared(
  context: StoreContext,
  folder: Folder,
  { vmid, folderName }: Pick<Point, "vmid" | "folderName">,
  cannotLock: (error: unknown) => void,
  signal: AbortSignal,
): Promise<LockFile | undefined> {
  const what = describe(vmid, folderName);
  await using held = new CleanupStack();
  let lock: LockFile | undefined;
  try {
    const place = { folder, name: `${sharedPrefix(folderName)}${randomUUID()}`, what };
    lock = held.use(await LockFile.acquire(place, context.timing, signal));
  } catch (error) {
    cannotLock(error);
  }
  // Also without a lock of our own: a full store is where somebody removes.
  let remover: SeenLock | undefined;
  try {
    remover = await inspectLock(folder, exclusiveName(folderName), context.timing, signal);
  } catch (error) {
    cannotLock(error);
  }
  if (remover !== undefined) {
    throw new LockedError(`Cannot read ${what}: it is being removed by ${describeHolder(remover)}`);
  }
  held.move();
  return lock;
}

/** The folder of the locks of a guest's points, made if it is not there; it is `owner`'s. */
async function openLocksFolder(context: StoreContext, vmid: number, owner: CleanupStack): Promise<Folder> {
  const guest = String(checkVmid(vmid));
  await using folder = await explain("open", context.folder.pathOf(guest), () => context.folder.openFolder(guest));
  return owner.use(await openOrMakeFolder(folder, POINT_LOCKS_FOLDER));
}

const sharedPrefix = (folderName: string): string => `${folderName}.shared-`;
const exclusiveName = (folderName: string): string => `${folderName}.exclusive`;
const describe = (vmid: number, folderName: string): string => `"${volnameOf(`${vmid}/${folderName}`)}"`;
