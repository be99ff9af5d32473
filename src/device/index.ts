// SPDX-License-Identifier: AGPL-3.0-or-later
export { FuseCalls } from "./fuse-calls.ts";
export { type NbdHost, nbdHost } from "./nbd-host.ts";
export { openRawView } from "./raw-view.ts";
export { type DirectoryView, mountSquashfs } from "./squashfs-view.ts";
export { sweepRawViews } from "./sweep.ts";
export { ViewFolder } from "./view-folder.ts";
export type { RawView, RawViewMechanism } from "./view-options.ts";
