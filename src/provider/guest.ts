// SPDX-License-Identifier: AGPL-3.0-or-later
// The words that every part of the contract uses.

export type GuestType = "qemu" | "lxc";

/** Size by device name, e.g. "drive-scsi0"; in bytes. */
export type DeviceSizes = ReadonlyMap<string, { readonly size: number }>;
