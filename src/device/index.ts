// SPDX-License-Identifier: AGPL-3.0-or-later
export { FuseCalls } from "./fuse-calls.ts";
export { hasNbdModule, type NbdHost, nbdHost } from "./nbd-host.ts";
export { type NbdReservation, type ReserveOptions, reserveNbdNode } from "./nbd-reservation.ts";
export { openRawView } from "./raw-view.ts";
export { type DirectoryView, mountSquashfs, type SquashfsMechanism, type SquashfsOptions } from "./squashfs-view.ts";
export { sweepRawViews } from "./sweep.ts";
export { ViewFolder } from "./view-folder.ts";
export type { RawView, RawViewMechanism, RawViewOptions } from "./view-options.ts";
