// SPDX-License-Identifier: AGPL-3.0-or-later
// What the modules of the store share: its directory, who we are, and how bytes become durable.
import { join } from "node:path";
import { environmentError } from "../core/index.ts";
import { type FileIdentity, FileProblem, Folder, isSameFile } from "../host/index.ts";
import type { DurableIo } from "./durable.ts";
import { StoreUnavailableError } from "./errors.ts";
import { guestFolder } from "./format/layout.ts";
import type { LockTiming } from "./lock/lock-record.ts";

export interface StoreContext {
  readonly path: string;
  /** Opened once: everything below it is reached through this descriptor. */
  readonly folder: Folder;
  readonly storeid: string;
  /** Prefix before /etc/pve, /run and /var/lib; empty on a real system. */
  readonly root: string;
  readonly nodename: string;
  readonly io: DurableIo;
  readonly timing: LockTiming;
  /** Takes what an administrator should know and no caller acts on. */
  readonly warn: (message: string) => void;
}

const MOUNT_HINT = "check that the share is mounted";

/** For messages, and for PVE, which shows it; nothing is opened by this path. */
export function pointFolder(context: StoreContext, vmid: number, folderName: string): string {
  return join(guestFolder(context.path, vmid), folderName);
}

/** @throws StoreUnavailableError with one clear sentence */
export async function openStoreFolder(path: string): Promise<Folder> {
  return await Folder.open(path).catch((error: unknown) => {
    const { message } =
      error instanceof FileProblem
        ? new Error(`Cannot use storage path "${path}": ${error.message}`)
        : environmentError("use storage path", path, error);
    throw new StoreUnavailableError(message, { cause: error, hint: MOUNT_HINT });
  });
}

/** Checks that the store's path still leads to a directory. @throws StoreUnavailableError */
export async function checkAvailable({ path }: StoreContext): Promise<FileIdentity> {
  await using folder = await openStoreFolder(path);
  return folder.identity;
}

/**
 * Before a write: checks that the path still leads to the directory that was opened.
 *
 * @throws StoreUnavailableError
 */
export async function checkSameStore(context: StoreContext): Promise<void> {
  if (isSameFile(await checkAvailable(context), context.folder.identity)) return;
  throw new StoreUnavailableError(
    `Cannot use storage path "${context.path}": another file system is mounted there, or the share is gone`,
    { hint: MOUNT_HINT },
  );
}
