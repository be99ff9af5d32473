// SPDX-License-Identifier: AGPL-3.0-or-later
// Which incarnation of a guest a bitmap belongs to: its vmgenid, which PVE changes at every rollback,
// and the QEMU process that holds the bitmap.
import { join } from "node:path";
import { type ProcessIdentity, readProcess, readRegularFile } from "../host/index.ts";
import { MAX_GUEST_CONFIG_BYTES, parseVmgenid } from "./guest-config.ts";
import { checkVmid } from "./vmid.ts";

/** Absent parts are unknown, and unknown never matches. */
export interface GuestIdentity {
  /** Lower case. */
  readonly vmgenid?: string;
  readonly process?: ProcessIdentity;
}

/** @param root prefix before /etc/pve and /run; empty on a real system */
export async function readGuestIdentity(vmid: number, root: string): Promise<GuestIdentity> {
  checkVmid(vmid);
  const config = await readIfThere(join(root || "/", `etc/pve/qemu-server/${vmid}.conf`), MAX_GUEST_CONFIG_BYTES);
  const vmgenid = config === undefined ? undefined : parseVmgenid(config);
  const process = await readGuestProcess(vmid, root);
  return { ...(vmgenid === undefined ? {} : { vmgenid }), ...(process === undefined ? {} : { process }) };
}

/** The QEMU process of a guest, by PVE's pid file; undefined where it does not run here. */
export async function readGuestProcess(vmid: number, root: string): Promise<ProcessIdentity | undefined> {
  const text = await readIfThere(join(root || "/", `run/qemu-server/${checkVmid(vmid)}.pid`), 64);
  const pid = text === undefined ? Number.NaN : Number(text.toString("latin1").trim());
  return Number.isSafeInteger(pid) && pid > 0 ? await readProcess(pid) : undefined;
}

/** Whatever the problem, an identity that cannot be read is unknown, and the backup becomes a full one. */
async function readIfThere(path: string, maxBytes: number): Promise<Buffer | undefined> {
  return await readRegularFile(path, maxBytes).catch(() => undefined);
}
