// SPDX-License-Identifier: AGPL-3.0-or-later
// The numbers of the qcow2 format. Source: QEMU docs/interop/qcow2. All fields are big-endian.

/** "QFI\xfb". */
export const QCOW2_MAGIC = 0x514649fb;
export const HEADER_BYTES_V2 = 72;
/** The minimum length of a version 3 header. */
export const HEADER_MIN_BYTES_V3 = 104;
/** The length with the compression type and its padding; QEMU has written this since 5.1. */
export const HEADER_BYTES_V3 = 112;

/** Byte positions of the header fields. Source: "Header". */
export const HeaderField = {
  magic: 0,
  version: 4,
  backingFileOffset: 8,
  backingFileBytes: 16,
  clusterBits: 20,
  virtualBytes: 24,
  cryptMethod: 32,
  l1Entries: 36,
  l1Offset: 40,
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  snapshots: 60,
  snapshotsOffset: 64,
  incompatible: 72,
  compatible: 80,
  autoclear: 88,
  refcountOrder: 96,
  headerBytes: 100,
  compressionType: 104,
} as const;

/** Bits of the incompatible features field: a program that does not know one must not open the image. */
export const Incompatible = {
  dirty: 1n << 0n,
  corrupt: 1n << 1n,
  externalDataFile: 1n << 2n,
  compressionType: 1n << 3n,
  extendedL2: 1n << 4n,
} as const;

/** Bits of the autoclear features field: a program that does not know one ignores it, and clears it when writing. */
export const Autoclear = { rawExternalData: 1n << 1n } as const;

/** Values of the compression type field. */
export const CompressionType = { zlib: 0, zstd: 1 } as const;

/** Header extension types. Source: "Header extensions". */
export const Extension = {
  end: 0x00000000,
  backingFormat: 0xe2792aca,
  externalDataFile: 0x44415441,
  bitmaps: 0x23852875,
  featureNames: 0x6803f857,
} as const;

/** Bits of L1 and L2 table entries. Source: "L1 table entry", "L2 table entry". */
export const ENTRY_COPIED = 1n << 63n;
export const ENTRY_COMPRESSED = 1n << 62n;
/** Bits 9 to 55 hold the host offset of a table or a cluster. */
export const ENTRY_OFFSET_MASK = 0x00fffffffffffe00n;
export const L1_RESERVED_MASK = 0x7f000000000001ffn;
export const L2_RESERVED_MASK = 0x3f000000000001fen;
export const L2_ZERO = 1n;
/** Refcount table entries: bits 9 to 63 hold the offset of a block. */
export const REFCOUNT_TABLE_RESERVED_MASK = 0x1ffn;

export const TABLE_ENTRY_BYTES = 8;
export const SECTOR_BYTES = 512;

// Limits. QEMU, too, refuses anything beyond these (block/qcow2.h), so no image in use can exceed them.
export const MIN_CLUSTER_BITS = 9;
export const MAX_CLUSTER_BITS = 21;
export const MAX_REFCOUNT_ORDER = 6;
/** QCOW_MAX_L1_SIZE. */
export const MAX_L1_BYTES = 32 * 1024 * 1024;
/** QCOW_MAX_REFTABLE_SIZE. */
export const MAX_REFCOUNT_TABLE_BYTES = 8 * 1024 * 1024;
/** "Must not be longer than 1023 bytes." */
export const MAX_BACKING_FILE_BYTES = 1023;
export const MAX_BACKING_FORMAT_BYTES = 15;
/** The largest virtual size at which every offset still fits into a table entry. */
export const MAX_VIRTUAL_BYTES = 2 ** 53 - 2 ** MAX_CLUSTER_BITS;

// Our files.
/** The head of a file: written last, digested last, whatever the cluster size. */
export const HEAD_BYTES = 64 * 1024;
export const DEFAULT_CLUSTER_BITS = 16;
export const REFCOUNT_ORDER = 4;
export const REFCOUNT_BYTES = 2;

/** zlib's -12: the window that QEMU compresses and inflates with. */
export const ZLIB_WINDOW_BITS = 12;
