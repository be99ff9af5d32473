// SPDX-License-Identifier: AGPL-3.0-or-later
// A VM's disk while it is backed up, as block's CopySource: QEMU's NBD export with a dirty bitmap, or a file
// handle of Proxmox VE's with dirty regions; and the words for what goes wrong there. How it is copied is for
// block, what the copy builds on is for store to know.
export { FileHandleSource } from "./file-handle-source.ts";
export { NbdSource, type NbdTimeouts } from "./nbd-source.ts";
export { explainLoss } from "./source-failure.ts";
