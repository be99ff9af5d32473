// SPDX-License-Identifier: AGPL-3.0-or-later
// Names inside the store. Everything that becomes part of a path passes one of these patterns first.
import { join } from "node:path";
import { RequestError } from "../core/index.ts";

export type PointType = "qemu" | "lxc";

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

/** What a container's archive may be called. */
export const CONTAINER_ARCHIVE_PATTERN = /^archive\.(?:tar(?:\.(?:gz|zst))?|sqfs)$/;
/** The archive among the files of a point: tar is preferred where both are there, in every process alike. */
export function pickContainerArchive(names: Iterable<string>): string | undefined {
  const archives = [...names].filter((name) => CONTAINER_ARCHIVE_PATTERN.test(name)).sort();
  return archives.find((name) => name.startsWith("archive.tar")) ?? archives[0];
}

export const UUID_PATTERN = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
/** PVE's own rule for storage ids. */
export const STOREID_PATTERN = /^[A-Za-z][A-Za-z0-9._-]{0,99}$/;

const VMID_PATTERN = /^[1-9][0-9]{2,8}$/;
const FOLDER_PATTERN = /^(qemu|lxc)-(0|[1-9][0-9]{0,11})$/;
const DEVICE_PATTERN = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;
const FILE_PATTERN = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
const QUOTED_CHARS = 80;

/** The parts of an archive name, `<vmid>/<qemu|lxc>-<epoch>`. */
export interface ArchiveName {
  readonly archive: string;
  readonly vmid: number;
  /** Name of the point's folder inside the guest's folder. */
  readonly folderName: string;
  readonly type: PointType;
  /** Unix time in seconds, as PVE named the backup. Never used to tell what is newer. */
  readonly epoch: number;
}

/** A short, printable form of a name that may be hostile. */
export function quote(name: string): string {
  return JSON.stringify(name.length > QUOTED_CHARS ? `${name.slice(0, QUOTED_CHARS)}...` : name);
}

/** @throws RequestError unless `vmid` is one PVE can give out: 100 to 999999999 */
export function checkVmid(vmid: number): number {
  if (!Number.isInteger(vmid) || !VMID_PATTERN.test(String(vmid))) {
    throw new RequestError(`Cannot use guest id ${quote(String(vmid))}: a number from 100 to 999999999 is wanted`);
  }
  return vmid;
}

export function isVmidName(name: string): boolean {
  return VMID_PATTERN.test(name);
}

export function isDeviceName(name: string): boolean {
  return DEVICE_PATTERN.test(name);
}

/** @throws RequestError for a name that must not become part of a file name */
export function checkDeviceName(name: string): string {
  if (!isDeviceName(name)) {
    throw new RequestError(`Cannot use device name ${quote(name)}: letters, digits, ".", "_" and "-" are wanted`);
  }
  return name;
}

/** True for what a manifest may list: no path, no leading dot. */
export function isPlainFileName(name: string): boolean {
  return FILE_PATTERN.test(name);
}

/** Splits `qemu-1700000000`; undefined for every other name. */
export function parseFolderName(vmid: number, folderName: string): ArchiveName | undefined {
  const match = FOLDER_PATTERN.exec(folderName);
  if (match === null) return undefined;
  const type: PointType = match[1] === "qemu" ? "qemu" : "lxc";
  return { archive: `${vmid}/${folderName}`, vmid, folderName, type, epoch: Number(match[2]) };
}

/**
 * Splits `<vmid>/<qemu|lxc>-<epoch>`, with or without PVE's `backup/` in front.
 *
 * @throws RequestError for anything else
 */
export function parseArchiveName(name: string): ArchiveName {
  const parts = (name.startsWith("backup/") ? name.slice("backup/".length) : name).split("/");
  const [vmid, folderName] = parts;
  const parsed =
    parts.length === 2 && vmid !== undefined && folderName !== undefined && isVmidName(vmid)
      ? parseFolderName(Number(vmid), folderName)
      : undefined;
  if (parsed === undefined) {
    throw new RequestError(`Cannot use volume name ${quote(name)}: "backup/<vmid>/<qemu|lxc>-<epoch>" is wanted`);
  }
  return parsed;
}

/** The volume name PVE knows a point by. */
export function volnameOf(archive: string): string {
  return `backup/${archive}`;
}

export function formatArchiveName(vmid: number, type: PointType, epoch: number): ArchiveName {
  return parseArchiveName(`${vmid}/${type}-${epoch}`);
}

export function deviceFileName(device: string): string {
  return `${checkDeviceName(device)}.qcow2`;
}

/** What the header of an incremental image names: relative, so that the store can move. */
export function backingFileName(baseFolderName: string, device: string): string {
  return `../${baseFolderName}/${deviceFileName(device)}`;
}

export function guestFolder(storePath: string, vmid: number): string {
  return join(storePath, String(checkVmid(vmid)));
}
