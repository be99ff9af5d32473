// SPDX-License-Identifier: AGPL-3.0-or-later
// The layer between readers and writers of a disk: extents, the plan of reads, zero detection, throttle, progress,
// and the copy itself. It knows a CopySource and a CopyTarget, but neither NBD nor qcow2: sources are in source, the
// writer is in qcow2. store decides whether a base can be trusted.
export { AlignedPool, type Slot } from "./aligned-pool.ts";
export { CLUSTER_BYTES, type CopyContent, type CopyPiece } from "./copy-content.ts";
export { type CopySource, copyDevice, POOL_SLOTS, READ_BYTES } from "./copy-device.ts";
export { type Extent, endOf, type SourceExtent, splitAt } from "./extents.ts";
export { formatDuration } from "./progress.ts";
export { Throttle } from "./throttle.ts";
export { isZero } from "./zero.ts";
