// SPDX-License-Identifier: AGPL-3.0-or-later
export { AlignedPool, type Slot } from "./aligned-pool.ts";
export { type CopySource, copyDevice, POOL_SLOTS, READ_BYTES } from "./copy-device.ts";
export { type Extent, endOf, type SourceExtent, splitAt } from "./extents.ts";
export { formatDuration } from "./progress.ts";
export { Throttle } from "./throttle.ts";
