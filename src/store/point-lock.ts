// SPDX-License-Identifier: AGPL-3.0-or-later
// Locks on single points: many readers, or one remover. Both sides create their own file first and look
// for the other's afterwards, so that at least one of two at the same time sees the other.
import { randomUUID } from "node:crypto";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { CleanupStack, environmentError, errnoOf, messageOf } from "../core/index.ts";
import { resolveChain } from "./chain.ts";
import type { StoreContext } from "./context.ts";
import { makeFolder } from "./durable.ts";
import { LockedError } from "./errors.ts";
import { guestFolder, POINT_LOCKS_FOLDER, volnameOf } from "./layout.ts";
import { inspectLock, LockFile } from "./lock-file.ts";
import { describeHolder, type SeenLock } from "./lock-record.ts";
import type { Point } from "./point.ts";

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
): Promise<AsyncDisposable> {
  await using held = new CleanupStack();
  let problem: string | undefined;
  for (const folder of await foldersOfChain(context, point, signal)) {
    const cannotLock = (error: unknown): void => {
      if (need === "required" || !CANNOT_LOCK.has(errnoOf(error) ?? "")) throw error;
      problem ??= messageOf(error);
    };
    await lockShared(context, point.vmid, folder, held, cannotLock, signal);
  }
  if (problem !== undefined) context.warn(`Reading "${point.volname}" without a lock: ${problem}`);
  // Between looking and locking somebody may have removed a part of it.
  await foldersOfChain(context, point, signal);
  return held.move();
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
  const folder = await locksFolder(context, vmid);
  await using held = new CleanupStack();
  held.use(await LockFile.acquire(join(folder, exclusiveName(folderName)), what, context.timing, signal));
  const names = await readdir(folder).catch((error: unknown) => {
    throw environmentError("list", folder, error);
  });
  for (const name of names.filter((one) => one.startsWith(sharedPrefix(folderName)))) {
    const holder = await inspectLock(join(folder, name), context.timing, signal);
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
  const path = join(await locksFolder(context, point.vmid), `${point.folderName}.attributes`);
  const what = `the attributes of ${describe(point.vmid, point.folderName)}`;
  const endMs = performance.now() + ATTRIBUTES_WAIT_MS;
  for (;;) {
    try {
      return await LockFile.acquire(path, what, context.timing, signal);
    } catch (error) {
      if (!(error instanceof LockedError) || performance.now() > endMs) throw error;
      await sleep(ATTRIBUTES_POLL_MS, undefined, { signal }).catch(() => signal.throwIfAborted());
    }
  }
}

async function foldersOfChain(context: StoreContext, point: Point, signal: AbortSignal): Promise<Set<string>> {
  const folders = new Set([point.folderName]);
  for (const device of point.devices.keys()) {
    const chain = await resolveChain(context, point, device, signal);
    for (const folder of chain.folders) folders.add(folder);
  }
  return folders;
}

/** @param cannotLock takes what kept the lock from being made, and throws it on if that must not be */
async function lockShared(
  context: StoreContext,
  vmid: number,
  folderName: string,
  held: CleanupStack,
  cannotLock: (error: unknown) => void,
  signal: AbortSignal,
): Promise<void> {
  const what = describe(vmid, folderName);
  const folder = locksFolderOf(context, vmid);
  try {
    await makeFolder(folder);
    const path = join(folder, `${sharedPrefix(folderName)}${randomUUID()}`);
    held.use(await LockFile.acquire(path, what, context.timing, signal));
  } catch (error) {
    cannotLock(error);
  }
  // Also without a lock of our own: a full store is where somebody removes.
  let remover: SeenLock | undefined;
  try {
    remover = await inspectLock(join(folder, exclusiveName(folderName)), context.timing, signal);
  } catch (error) {
    cannotLock(error);
  }
  if (remover !== undefined) {
    throw new LockedError(`Cannot read ${what}: it is being removed by ${describeHolder(remover)}`);
  }
}

async function locksFolder(context: StoreContext, vmid: number): Promise<string> {
  const folder = locksFolderOf(context, vmid);
  await makeFolder(folder);
  return folder;
}

const locksFolderOf = (context: StoreContext, vmid: number): string =>
  join(guestFolder(context.path, vmid), POINT_LOCKS_FOLDER);

const sharedPrefix = (folderName: string): string => `${folderName}.shared-`;
const exclusiveName = (folderName: string): string => `${folderName}.exclusive`;
const describe = (vmid: number, folderName: string): string => `"${volnameOf(`${vmid}/${folderName}`)}"`;
