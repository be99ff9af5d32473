// SPDX-License-Identifier: AGPL-3.0-or-later
// Directories of the upstream example plugin: no manifest, absolute backing paths. Read, never built on.

import { quote } from "../../core/index.ts";
import { findBackedUpDrives, isDeviceName, type PointType, parseDeviceMap, parseFolderName } from "../../pve/index.ts";
import { isAppendedImage, type Qcow2Header } from "../../qcow2/index.ts";
import { deviceFileName, pickContainerArchive } from "./layout.ts";

const DISK_SUFFIX = ".qcow2";

type LegacyVerdict =
  | { readonly devices: readonly string[]; readonly containerArchive: string | undefined }
  | { readonly problem: string };

/**
 * Whether a directory without a manifest is a complete backup of the example.
 *
 * @param files names of the regular files in the directory
 */
export function judgeLegacy(type: PointType, config: Buffer, files: ReadonlySet<string>): LegacyVerdict {
  if (config.length === 0) return { problem: "it has no manifest, and its guest config is empty" };
  if (type === "lxc") {
    const containerArchive = pickContainerArchive(files);
    if (containerArchive === undefined) return { problem: "it has no manifest and no container archive" };
    return { devices: [], containerArchive };
  }
  const map = parseDeviceMap(config);
  if (map === undefined) return { problem: "it has no manifest, and its guest config names an impossible device" };
  // The map is the end of the config: what a truncated config does not name would be lost silently.
  const unmapped = findBackedUpDrives(config).find((drive) => !map.has(drive));
  if (unmapped !== undefined) {
    return { problem: `it has no manifest, and its guest config does not tell which file is ${unmapped}` };
  }
  const devices = new Set(map.values());
  const missing = [...devices].find((device) => !files.has(deviceFileName(device)));
  if (missing !== undefined) return { problem: `it has no manifest, and its disk ${missing} is missing` };
  const unknown = [...files].find((file) => file.endsWith(DISK_SUFFIX) && !devices.has(deviceOf(file)));
  if (unknown !== undefined) {
    return { problem: `it has no manifest, and its guest config does not name its file ${quote(unknown)}` };
  }
  return { devices: [...devices], containerArchive: undefined };
}

/** True for an image of this software: by its layout, or by the relative name of its base. */
export function isOwnImage(header: Qcow2Header): boolean {
  const backing = header.backing?.file;
  return isAppendedImage(header) || (backing !== undefined && /^\.\.\/qemu-[0-9]+\/[^/]+\.qcow2$/.test(backing));
}

/**
 * Maps a backing file name by its last two components: the store may have moved since.
 *
 * @returns the directory beside this one and the file in it, or undefined for any other name
 */
export function parseLegacyBacking(vmid: number, name: string): { folder: string; file: string } | undefined {
  const parts = name.split("/");
  const file = parts.at(-1);
  const folder = parts.at(-2);
  if (file === undefined || folder === undefined || parseFolderName(vmid, folder) === undefined) return undefined;
  const isDisk = file.endsWith(DISK_SUFFIX) && isDeviceName(deviceOf(file));
  return isDisk ? { folder, file } : undefined;
}

const deviceOf = (file: string): string => file.slice(0, -DISK_SUFFIX.length);
