// SPDX-License-Identifier: AGPL-3.0-or-later
// How another program sees a disk or an archive: a raw file by FUSE, a block device by the kernel's nbd, the
// directory of a squashfs image; and what a killed process left behind of these. It gets open files and starts
// servers through host. Which images form a chain, and whether they are sound, is known to store and qcow2.
export { FuseCalls } from "./fuse-calls.ts";
export { type NbdHost, nbdHost } from "./nbd-host.ts";
export { openRawView } from "./raw-view.ts";
export { type DirectoryView, mountSquashfs } from "./squashfs-view.ts";
export { sweepRawViews } from "./sweep.ts";
export { ViewFolder } from "./view-folder.ts";
export type { RawView, RawViewMechanism } from "./view-options.ts";
