// SPDX-License-Identifier: AGPL-3.0-or-later
// What we read in a guest's config: its vmgenid, its disks, and the lines that reach the host when the guest starts.
// For the first two only the part above the first "[section]" counts: below it are snapshots and pending changes.
import { isUuid } from "../core/index.ts";
import type { PointType } from "./archive-name.ts";
import { isDeviceName } from "./device.ts";

/** The limit for any guest or firewall config, in its place or in a backup. */
export const MAX_GUEST_CONFIG_BYTES = 4 * 1024 * 1024;

const ZERO_UUID = "00000000-0000-0000-0000-000000000000";
const MAX_DEVICES = 500;
const DISK_KEY = "(?:(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\\d+|cdrom)";
/** A volume that is a path, anywhere in a property string: the order is free, and so is the key of the first part. */
const IS_PATH = "\\s*(?:.*,\\s*)?(?:(?:file|volume)=)?/";

/**
 * What makes a line worth a look: its key, and for some its value. Any number of blanks may follow the colon,
 * including none. Source: parse_vm_config() of PVE::QemuServer, parse_pct_config() of PVE::LXC::Config.
 */
const TELLING: Readonly<Record<PointType, readonly RegExp[]>> = {
  qemu: [
    /^(args|hookscript|ivshmem):/,
    /^(hostpci\d+|parallel\d+|virtiofs\d+):/,
    /^(rng\d+):(?!\s*source=\/dev\/u?random\b)/,
    /^(usb\d+):(?!\s*(?:host=)?spice\s*(?:,|$))/,
    /^(serial\d+):\s*\/dev\//,
    new RegExp(`^(${DISK_KEY}):${IS_PATH}`),
  ],
  lxc: [
    /^(lxc\.[\w.-]+)\s*[:=]/,
    /^(hookscript):/,
    /^(dev\d+):/,
    /^(features):(?!\s*(?:(?:nesting|keyctl)=[01],?)*\s*$)/,
    new RegExp(`^(mp\\d+|rootfs):${IS_PATH}`),
  ],
};

const allLines = (config: Buffer): string[] => config.toString("latin1").split("\n");

function mainLines(config: Buffer): string[] {
  const lines = allLines(config);
  const end = lines.findIndex((line) => line.startsWith("["));
  return end === -1 ? lines : lines.slice(0, end);
}

/** The guest's vmgenid, in lower case. "0" (switched off), "1" (to be made) and the zero UUID do not count as one. */
export function parseVmgenid(config: Buffer): string | undefined {
  let found: string | undefined;
  for (const line of mainLines(config)) {
    found = /^vmgenid:\s*(\S+)\s*$/.exec(line)?.[1]?.toLowerCase() ?? found;
  }
  return found !== undefined && isUuid(found) && found !== ZERO_UUID ? found : undefined;
}

/**
 * What a backed up config says in its `#qmdump#map:<drive>:<device>:<storage>:<format>:` lines, wherever they are.
 *
 * @returns devices by drive ("scsi0"); undefined if a line names something that cannot be a device
 */
export function parseDeviceMap(config: Buffer): Map<string, string> | undefined {
  const devices = new Map<string, string>();
  for (const line of allLines(config)) {
    if (!line.startsWith("#qmdump#map:")) continue;
    const [, drive, device] = /^#qmdump#map:([^:\s]+):([^:\s]+):[^:\s]*:[^:\s]*:\s*$/.exec(line) ?? [];
    if (drive === undefined || device === undefined || !isDeviceName(device)) return undefined;
    devices.set(drive, device);
    if (devices.size > MAX_DEVICES) return undefined;
  }
  return devices;
}

/** Drives that every backup of this config holds: not CD-ROMs, nor what is or may be left out of backups. */
export function findBackedUpDrives(config: Buffer): string[] {
  const drives: string[] = [];
  const lines = mainLines(config);
  const isOvmf = lines.some((line) => /^bios:\s*ovmf\s*$/.test(line));
  for (const line of lines) {
    const [, drive, value] = /^((?:ide|sata|scsi|virtio|efidisk|tpmstate)[0-9]{1,2}):\s*(.*)$/.exec(line) ?? [];
    if (drive === undefined || value === undefined) continue;
    const options = value.trim().split(",");
    const isLeftOut = options.some((one) => /^(?:none|cdrom|media=cdrom|backup=(?:0|no|off|false))$/.test(one));
    if (!isLeftOut && (isOvmf || !drive.startsWith("efidisk"))) drives.push(drive);
  }
  return drives;
}

/**
 * Keys of the lines that run programs or reach the host when the guest starts, in order, each once. Also below a
 * `[section]`: vzdump puts none into a backup, and pending changes that were added take effect at the next start.
 */
export function findTellingKeys(type: PointType, config: Buffer): string[] {
  const keys = new Set<string>();
  for (const line of allLines(config)) {
    for (const pattern of TELLING[type]) {
      const key = pattern.exec(line)?.[1];
      if (key !== undefined) keys.add(key);
    }
  }
  return [...keys];
}
