// SPDX-License-Identifier: AGPL-3.0-or-later
// The content of a new image's header, checked before anything is written.
import { alignUp, RequestError } from "../core/index.ts";
import type { CompressionKind } from "./compress-protocol.ts";
import { DEFAULT_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS, SECTOR_BYTES, TABLE_ENTRY_BYTES } from "./constants.ts";
import { encodeQcow2Header } from "./header.ts";
import type { ImageShape } from "./table-builder.ts";
import { l2CoverageBytes } from "./tables.ts";

export type Compression = "none" | CompressionKind;

/** What decides the layout of a new image. */
export interface ShapeOptions {
  /** Size of the disk in bytes; rounded up to a sector of 512, QEMU's unit. */
  readonly virtualBytes: number;
  /** As the header will name it; a relative name starts at the image's directory. */
  readonly backing?: { readonly file: string; readonly format: "qcow2" } | undefined;
  readonly compression: Compression;
  /** 9 to 16; default 16, which is 64 KiB. */
  readonly clusterBits?: number;
}

/**
 * Determines the content of a new image's header.
 *
 * @throws RequestError if we do not support the cluster size, or the disk is too large for it;
 *   Qcow2FormatError if the backing name does not fit
 */
export function planShape(options: ShapeOptions): ImageShape {
  const clusterBits = options.clusterBits ?? DEFAULT_CLUSTER_BITS;
  if (!Number.isInteger(clusterBits) || clusterBits < MIN_CLUSTER_BITS || clusterBits > DEFAULT_CLUSTER_BITS) {
    throw new RequestError(`Cannot write clusters of ${clusterBits} bits: expected 9 to ${DEFAULT_CLUSTER_BITS}`);
  }
  const maxBytes = (MAX_L1_BYTES / TABLE_ENTRY_BYTES) * l2CoverageBytes(2 ** clusterBits);
  if (!Number.isSafeInteger(options.virtualBytes) || options.virtualBytes < 0 || options.virtualBytes > maxBytes) {
    throw new RequestError(`Cannot write a disk of ${options.virtualBytes} bytes: expected 0 to ${maxBytes}`);
  }
  const shape: ImageShape = {
    virtualBytes: alignUp(options.virtualBytes, SECTOR_BYTES),
    clusterBits,
    compression: options.compression === "none" ? "zlib" : options.compression,
    ...(options.backing === undefined ? {} : { backing: options.backing }),
  };
  // Checks names now, not after hours of copying.
  encodeQcow2Header({ ...shape, l1Entries: 0, l1Offset: 0, refcountTableOffset: 0, refcountTableClusters: 0 });
  return shape;
}
