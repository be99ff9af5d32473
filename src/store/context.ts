// SPDX-License-Identifier: AGPL-3.0-or-later
// What the modules of the store share: where it is, who we are, and how bytes become durable.
import { join } from "node:path";
import type { DurableIo } from "./durable.ts";
import { guestFolder } from "./layout.ts";
import type { LockTiming } from "./lock-record.ts";

/** Which folder a path led to: device and inode, as stat() says them. */
export interface StoreIdentity {
  readonly dev: bigint;
  readonly ino: bigint;
}

export interface StoreContext {
  readonly path: string;
  /** Of the folder that was opened; another one at the same path is not this store. */
  readonly identity: StoreIdentity;
  readonly storeid: string;
  /** Prefix before /etc/pve, /run and /var/lib; empty on a real system. */
  readonly root: string;
  readonly nodename: string;
  readonly io: DurableIo;
  readonly timing: LockTiming;
  /** Takes what an admin should know and no caller acts on. */
  readonly warn: (message: string) => void;
}

export function pointFolder(context: StoreContext, vmid: number, folderName: string): string {
  return join(guestFolder(context.path, vmid), folderName);
}
