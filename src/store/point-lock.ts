// SPDX-License-Identifier: AGPL-3.0-or-later
// Locks on single points: many readers, or one remover. Both sides create their own file first and look
// for the other's afterwards, so that at least one of two at the same time sees the other.
import { randomUUID } from "node:crypto";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { CleanupStack, errnoOf } from "../core/index.ts";
import { resolveChain } from "./chain.ts";
import type { StoreContext } from "./context.ts";
import { makeFolder } from "./durable.ts";
import { LockedError } from "./errors.ts";
import { guestFolder, POINT_LOCKS_FOLDER, volnameOf } from "./layout.ts";
import { inspectLock, LockFile } from "./lock-file.ts";
import { describeHolder } from "./lock-record.ts";
import type { Point } from "./point.ts";

const ATTRIBUTES_WAIT_MS = 10_000;
const ATTRIBUTES_POLL_MS = 50;

const NOTHING_HELD: AsyncDisposable = { [Symbol.asyncDispose]: async () => undefined };

/**
 * Readers' lock on a point and on everything it builds on.
 *
 * @throws LockedError if one of them is being removed; PointDamagedError if the chain is not whole
 */
export async function lockChainShared(
  context: StoreContext,
  point: Point,
  signal: AbortSignal,
): Promise<AsyncDisposable> {
  await using held = new CleanupStack();
  for (const folder of await foldersOfChain(context, point, signal)) {
    held.use(await lockShared(context, point.vmid, folder, signal));
  }
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
  const readers = (await readdir(folder)).filter((name) => name.startsWith(sharedPrefix(folderName)));
  for (const name of readers) {
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
      await sleep(ATTRIBUTES_POLL_MS);
    }
  }
}

async function foldersOfChain(context: StoreContext, point: Point, signal: AbortSignal): Promise<Set<string>> {
  const folders = new Set([point.folderName]);
  for (const device of point.devices.keys()) {
    for (const folder of (await resolveChain(context, point, device, signal)).folders) folders.add(folder);
  }
  return folders;
}

async function lockShared(
  context: StoreContext,
  vmid: number,
  folderName: string,
  signal: AbortSignal,
): Promise<AsyncDisposable> {
  const what = describe(vmid, folderName);
  await using held = new CleanupStack();
  try {
    const folder = await locksFolder(context, vmid);
    const path = join(folder, `${sharedPrefix(folderName)}${randomUUID()}`);
    held.use(await LockFile.acquire(path, what, context.timing, signal));
    const remover = await inspectLock(join(folder, exclusiveName(folderName)), context.timing, signal);
    if (remover !== undefined) {
      throw new LockedError(`Cannot read ${what}: it is being removed by ${describeHolder(remover)}`);
    }
    return held.move();
  } catch (error) {
    // A store mounted read-only can still be restored from.
    if (errnoOf(error) === "EROFS") return NOTHING_HELD;
    throw error;
  }
}

async function locksFolder(context: StoreContext, vmid: number): Promise<string> {
  const folder = join(guestFolder(context.path, vmid), POINT_LOCKS_FOLDER);
  await makeFolder(folder);
  return folder;
}

const sharedPrefix = (folderName: string): string => `${folderName}.shared-`;
const exclusiveName = (folderName: string): string => `${folderName}.exclusive`;
const describe = (vmid: number, folderName: string): string => `"${volnameOf(`${vmid}/${folderName}`)}"`;
