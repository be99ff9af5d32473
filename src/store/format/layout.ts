// SPDX-License-Identifier: AGPL-3.0-or-later
// Names inside the store. Everything that becomes part of a path must first match one of these patterns or one of
// PVE's.
import { join } from "node:path";
import { checkDeviceName, checkVmid } from "../../pve/index.ts";

export const MANIFEST_FILE = "manifest.json";
export const ATTRIBUTES_FILE = "attributes.json";
export const GUEST_CONFIG_FILE = "guest.conf";
export const FIREWALL_CONFIG_FILE = "firewall.conf";
export const LOG_FILE = "backup.log";
export const STATE_FILE = "state.json";
export const GUEST_LOCK_FILE = ".lock";
/** Locks on single points: readers, removers, writers of attributes. */
export const POINT_LOCKS_FOLDER = ".locks";
export const FAILED_LOGS_FOLDER = "failed";

export const STAGING_PREFIX = ".staging-";
export const TRASH_PREFIX = ".trash-";
export const TEMP_PREFIX = ".tmp-";

const FILE_PATTERN = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
/** What a container's archive may be called. */
export const CONTAINER_ARCHIVE_PATTERN = /^archive\.(?:tar(?:\.(?:gz|zst))?|sqfs)$/;
/** The archive among the files of a point: if both exist, every process prefers the tar. */
export function pickContainerArchive(names: Iterable<string>): string | undefined {
  const archives = [...names].filter((name) => CONTAINER_ARCHIVE_PATTERN.test(name)).sort();
  return archives.find((name) => name.startsWith("archive.tar")) ?? archives[0];
}

/** True for a name that a manifest may list: no path, no leading dot. */
export function isPlainFileName(name: string): boolean {
  return FILE_PATTERN.test(name);
}

export function deviceFileName(device: string): string {
  return `${checkDeviceName(device)}.qcow2`;
}

/** The block digests of an image. */
export function digestsFileName(device: string): string {
  return `${checkDeviceName(device)}.digests`;
}

export function isDigestsFileName(name: string): boolean {
  return name.endsWith(".digests");
}

/** What the header of an incremental image names: a relative path, so the store can move. */
export function backingFileName(baseFolderName: string, device: string): string {
  return `../${baseFolderName}/${deviceFileName(device)}`;
}

export function guestFolder(storePath: string, vmid: number): string {
  return join(storePath, String(checkVmid(vmid)));
}
