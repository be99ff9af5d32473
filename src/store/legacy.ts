// SPDX-License-Identifier: AGPL-3.0-or-later
// Folders of the upstream example plugin: no manifest, absolute backing paths. Read, never built on.
import { CONTAINER_ARCHIVE_PATTERN, deviceFileName, isDeviceName, type PointType, parseFolderName } from "./layout.ts";

const MAX_DEVICES = 500;

/**
 * The devices that a guest config names in its `#qmdump#map:<drive>:<device>:<storage>:<format>:` lines.
 *
 * @returns undefined if a line names something that cannot be a device
 */
export function parseDeviceMap(config: Buffer): string[] | undefined {
  const devices = new Set<string>();
  for (const line of config.toString("latin1").split("\n")) {
    if (!line.startsWith("#qmdump#map:")) continue;
    const device = /^#qmdump#map:[^:\s]+:([^:\s]+):[^:\s]*:[^:\s]*:\s*$/.exec(line)?.[1];
    if (device === undefined || !isDeviceName(device) || devices.size >= MAX_DEVICES) return undefined;
    devices.add(device);
  }
  return [...devices];
}

export type LegacyVerdict =
  | { readonly devices: readonly string[]; readonly containerArchive: string | undefined }
  | { readonly problem: string };

/**
 * Whether a folder without manifest is a whole backup of the example.
 *
 * @param files names of the regular files in the folder
 */
export function judgeLegacy(type: PointType, config: Buffer, files: ReadonlySet<string>): LegacyVerdict {
  if (config.length === 0) return { problem: "it has no manifest, and its guest config is empty" };
  if (type === "lxc") {
    const containerArchive = [...files].find((name) => CONTAINER_ARCHIVE_PATTERN.test(name));
    if (containerArchive === undefined) return { problem: "it has no manifest and no container archive" };
    return { devices: [], containerArchive };
  }
  const devices = parseDeviceMap(config);
  if (devices === undefined) return { problem: "it has no manifest, and its guest config names an impossible device" };
  const missing = devices.find((device) => !files.has(deviceFileName(device)));
  if (missing !== undefined) return { problem: `it has no manifest, and its disk ${missing} is missing` };
  return { devices, containerArchive: undefined };
}

/**
 * Maps a backing file name by its last two components: the store may have moved since.
 *
 * @returns the folder beside this one and the file in it, or undefined for any other name
 */
export function parseLegacyBacking(vmid: number, name: string): { folder: string; file: string } | undefined {
  const parts = name.split("/");
  const file = parts.at(-1);
  const folder = parts.at(-2);
  if (file === undefined || folder === undefined || parseFolderName(vmid, folder) === undefined) return undefined;
  const isDisk = file.endsWith(".qcow2") && isDeviceName(file.slice(0, -".qcow2".length));
  return isDisk ? { folder, file } : undefined;
}
