// SPDX-License-Identifier: AGPL-3.0-or-later
// Locks on single points: a remover's, and one for changing attributes. Readers' locks are in chain-lock.ts.
import { setTimeout as sleep } from "node:timers/promises";
import { CleanupStack } from "../../core/index.ts";
import type { Folder } from "../../host/index.ts";
import { checkVmid, volnameOf } from "../../pve/index.ts";
import type { StoreContext } from "../context.ts";
import { explain, openOrMakeFolder } from "../durable.ts";
import { LockedError } from "../errors.ts";
import { POINT_LOCKS_FOLDER } from "../format/layout.ts";
import { inspectLock, LockFile } from "./lock-file.ts";
import { describeHolder, type SeenLock } from "./lock-record.ts";

const ATTRIBUTES_WAIT_MS = 10_000;
const ATTRIBUTES_POLL_MS = 50;

/** `<top of the chain>.shared-<uuid>`, `<point>.exclusive`, `<point>.attributes` */
export const SHARED_INFIX = ".shared-";
export const EXCLUSIVE_SUFFIX = ".exclusive";
const ATTRIBUTES_SUFFIX = ".attributes";

interface PointName {
  readonly vmid: number;
  readonly folderName: string;
}

/**
 * Remover's lock on one point; the caller holds the guest's lock too.
 *
 * @throws LockedError while the point, or one that builds on it, is being read
 */
export async function lockPointExclusive(
  context: StoreContext,
  point: PointName,
  signal: AbortSignal,
): Promise<AsyncDisposable> {
  const { vmid, folderName } = point;
  const what = describe(point);
  await using held = new CleanupStack();
  const folder = await openLocksFolder(context, vmid, held);
  const place = { folder, name: `${folderName}${EXCLUSIVE_SUFFIX}`, what };
  held.use(await LockFile.acquire(place, context.timing, signal));
  const names = await explain("list", folder.path, () => folder.list());
  for (const name of names.filter((one) => one.includes(SHARED_INFIX))) {
    const holder = await inspectLock({ folder, name, what }, context.timing, signal);
    if (holder !== undefined && covers(name, holder, folderName)) {
      throw new LockedError(`Cannot lock ${what}: it is being read by ${describeHolder(holder)}`);
    }
  }
  return held.move();
}

/** A lock that cannot be understood may cover everything. */
function covers(name: string, { record }: SeenLock, folderName: string): boolean {
  if (record === undefined || name.startsWith(`${folderName}${SHARED_INFIX}`)) return true;
  return record.points?.includes(folderName) ?? false;
}

/** Held only while attributes change; waits for other processes that change them, too. */
export async function lockAttributes(
  context: StoreContext,
  point: PointName,
  signal: AbortSignal,
): Promise<AsyncDisposable> {
  await using held = new CleanupStack();
  const folder = await openLocksFolder(context, point.vmid, held);
  const place = {
    folder,
    name: `${point.folderName}${ATTRIBUTES_SUFFIX}`,
    what: `the attributes of ${describe(point)}`,
  };
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

/** The directory with the locks on a guest's points, created if it does not exist; `owner` owns it. */
export async function openLocksFolder(context: StoreContext, vmid: number, owner: CleanupStack): Promise<Folder> {
  const guest = String(checkVmid(vmid));
  await using folder = await explain("open", context.folder.pathOf(guest), () => context.folder.openFolder(guest));
  return owner.use(await openOrMakeFolder(folder, POINT_LOCKS_FOLDER));
}

const describe = ({ vmid, folderName }: PointName): string => `"${volnameOf(`${vmid}/${folderName}`)}"`;
