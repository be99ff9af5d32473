// SPDX-License-Identifier: AGPL-3.0-or-later
// The names by which PVE knows a backup: the archive name "<vmid>/<qemu|lxc>-<epoch>", and the volume name, which
// puts "backup/" in front. Every number has one spelling: no leading zeros.
import { quote, RequestError } from "../core/index.ts";
import { isVmidName } from "./vmid.ts";

export type PointType = "qemu" | "lxc";

const FOLDER_PATTERN = /^(qemu|lxc)-(0|[1-9][0-9]{0,11})$/;
const VOLNAME_PREFIX = "backup/";

/** The parts of an archive name. */
export interface ArchiveName {
  readonly archive: string;
  readonly vmid: number;
  /** Its last part: name of the backup's directory inside the guest's directory. */
  readonly folderName: string;
  readonly type: PointType;
  /** Unix time in seconds, as PVE named the backup. Never used to decide which backup is newer. */
  readonly epoch: number;
}

/** Splits `qemu-1700000000`; undefined for every other name. */
export function parseFolderName(vmid: number, folderName: string): ArchiveName | undefined {
  const match = FOLDER_PATTERN.exec(folderName);
  if (match === null) return undefined;
  const type: PointType = match[1] === "qemu" ? "qemu" : "lxc";
  return { archive: `${vmid}/${folderName}`, vmid, folderName, type, epoch: Number(match[2]) };
}

/** True for the last part of an archive name. */
export function isFolderName(name: string): boolean {
  return FOLDER_PATTERN.test(name);
}

/** True for an archive name without `backup/` in front. */
export function isArchiveName(name: string): boolean {
  const [vmid, folderName, ...rest] = name.split("/");
  return vmid !== undefined && isVmidName(vmid) && isFolderName(folderName ?? "") && rest.length === 0;
}

/**
 * Splits an archive name, with or without `backup/` in front.
 *
 * @throws RequestError for anything else
 */
export function parseArchiveName(name: string): ArchiveName {
  const archive = name.startsWith(VOLNAME_PREFIX) ? name.slice(VOLNAME_PREFIX.length) : name;
  const [vmid, folderName, ...rest] = archive.split("/");
  const parsed =
    vmid !== undefined && folderName !== undefined && rest.length === 0 && isVmidName(vmid)
      ? parseFolderName(Number(vmid), folderName)
      : undefined;
  if (parsed === undefined) {
    throw new RequestError(`Cannot use volume name ${quote(name)}: expected "backup/<vmid>/<qemu|lxc>-<epoch>"`);
  }
  return parsed;
}

export function formatArchiveName(vmid: number, type: PointType, epoch: number): ArchiveName {
  return parseArchiveName(`${vmid}/${type}-${epoch}`);
}

/** The volume name by which PVE knows a backup. */
export function volnameOf(archive: string): string {
  return `${VOLNAME_PREFIX}${archive}`;
}
