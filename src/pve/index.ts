// SPDX-License-Identifier: AGPL-3.0-or-later
// Proxmox VE's names and grammars, each in one place: vmid, storage id, device, archive name, guest config; and a
// guest by its identity on this node. It parses, formats and reads what Proxmox VE keeps. Only `store` knows what a
// store does with a name.
export {
  type ArchiveName,
  formatArchiveName,
  isArchiveName,
  isFolderName,
  type PointType,
  parseArchiveName,
  parseFolderName,
  volnameOf,
} from "./archive-name.ts";
export { checkDeviceName, isDeviceName } from "./device.ts";
export {
  findBackedUpDrives,
  findTellingKeys,
  MAX_GUEST_CONFIG_BYTES,
  parseDeviceMap,
  parseVmgenid,
} from "./guest-config.ts";
export { type GuestIdentity, readGuestIdentity, readGuestProcess } from "./guest-identity.ts";
export { STOREID_PATTERN } from "./storeid.ts";
export { checkVmid, isVmidName } from "./vmid.ts";
