// SPDX-License-Identifier: AGPL-3.0-or-later
// A VM's disk while it is being backed up, as block's CopySource: QEMU's NBD export with a dirty bitmap, or one of
// Proxmox VE's file handles with dirty regions; and the wording of failures there. block knows how the disk is copied,
// store knows what the copy builds on.
export { FileHandleSource } from "./file-handle-source.ts";
export { NbdSource, type NbdTimeouts } from "./nbd-source.ts";
export { explainLoss } from "./source-failure.ts";
