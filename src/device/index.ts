// SPDX-License-Identifier: AGPL-3.0-or-later
export { openRawView, type RawView, type RawViewMechanism, type RawViewOptions } from "./raw-view.ts";
export { type DirectoryView, mountSquashfs, type SquashfsMechanism, type SquashfsOptions } from "./squashfs-view.ts";
export { sweepRawViews } from "./sweep.ts";
export { ViewFolder } from "./view-folder.ts";
