// SPDX-License-Identifier: AGPL-3.0-or-later
// How another program sees a disk or an archive: as a raw file by FUSE, as a block device by the kernel's nbd, or as
// the directory of a squashfs image; this module also cleans up what a killed process left of these. It gets open files
// and starts servers through host. store and qcow2 know which images form a chain and whether they are sound.
export { FuseCalls } from "./fuse-calls.ts";
export { type NbdHost, nbdHost } from "./nbd-host.ts";
export { openRawView } from "./raw-view.ts";
export { type DirectoryView, mountSquashfs } from "./squashfs-view.ts";
export { sweepRawViews } from "./sweep.ts";
export { ViewFolder } from "./view-folder.ts";
export type { RawView, RawViewMechanism } from "./view-options.ts";
