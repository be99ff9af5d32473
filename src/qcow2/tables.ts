// SPDX-License-Identifier: AGPL-3.0-or-later
// L1, L2 and refcount table entries: numbers in, values out; no I/O.
import {
  ENTRY_COMPRESSED,
  ENTRY_COPIED,
  ENTRY_OFFSET_MASK,
  L1_RESERVED_MASK,
  L2_RESERVED_MASK,
  L2_ZERO,
  REFCOUNT_TABLE_RESERVED_MASK,
  SECTOR_BYTES,
  TABLE_ENTRY_BYTES,
} from "./constants.ts";
import { Qcow2FormatError } from "./errors.ts";

/** Where a guest cluster lives. Offsets and lengths are bytes from the start of the file. */
export type L2Entry =
  | { readonly kind: "unallocated" }
  /** Reads as zero and hides the backing file; `hostOffset` is 0 if no cluster is kept for it. */
  | { readonly kind: "zero"; readonly hostOffset: number; readonly isCopied: boolean }
  | { readonly kind: "data"; readonly hostOffset: number; readonly isCopied: boolean }
  /** `length` counts whole sectors: the stream ends somewhere in the last one. */
  | { readonly kind: "compressed"; readonly hostOffset: number; readonly length: number };

/** An L1 entry: 0 if there is no L2 table. */
interface L1Entry {
  readonly l2Offset: number;
  readonly isCopied: boolean;
}

/** How many guest bytes one L2 table maps. */
export function l2CoverageBytes(clusterBytes: number): number {
  return clusterBytes * (clusterBytes / TABLE_ENTRY_BYTES);
}

/** Bit position of the sector count in a compressed descriptor: "x = 62 - (cluster_bits - 8)". */
function compressedSizeShift(clusterBytes: number): bigint {
  return BigInt(62 - (Math.log2(clusterBytes) - 8));
}

export function encodeL1Entry(l2Offset: number): bigint {
  return BigInt(l2Offset) | ENTRY_COPIED;
}

/**
 * Decodes an L1 table entry.
 *
 * @throws Qcow2FormatError if reserved bits are set or the offset is not cluster-aligned
 *
 * Source: QEMU docs/interop/qcow2, "L1 table entry".
 */
export function decodeL1Entry(entry: bigint, clusterBytes: number): L1Entry {
  if ((entry & L1_RESERVED_MASK) !== 0n) throw badEntry("L1", entry, "reserved bits are set");
  const l2Offset = decodeOffset("L1", entry, clusterBytes);
  return { l2Offset, isCopied: (entry & ENTRY_COPIED) !== 0n };
}

/** The entry of a data cluster that only this image refers to. */
export function encodeDataEntry(hostOffset: number): bigint {
  return BigInt(hostOffset) | ENTRY_COPIED;
}

/** The entry of a cluster that reads as zero and occupies nothing. */
export function encodeZeroEntry(): bigint {
  return L2_ZERO;
}

/**
 * The entry of a compressed cluster.
 *
 * @param hostOffset the byte where its stream begins; need not be aligned
 * @param length of the stream in bytes, at least 1 and less than the cluster size
 *
 * Source: "Compressed Clusters Descriptor".
 */
export function encodeCompressedEntry(hostOffset: number, length: number, clusterBytes: number): bigint {
  const firstSector = Math.floor(hostOffset / SECTOR_BYTES);
  const lastSector = Math.floor((hostOffset + length - 1) / SECTOR_BYTES);
  const additionalSectors = BigInt(lastSector - firstSector);
  return ENTRY_COMPRESSED | (additionalSectors << compressedSizeShift(clusterBytes)) | BigInt(hostOffset);
}

/**
 * Decodes one standard (8-byte) L2 table entry.
 *
 * @param entry the big-endian u64 as read from the table
 * @param clusterBytes cluster size in bytes, a power of two, 512 or more
 * @param version of the image: version 2 does not have zero clusters
 * @throws Qcow2FormatError if reserved bits are set or the offset is not cluster-aligned
 *
 * Source: QEMU docs/interop/qcow2, "Standard Cluster Descriptor".
 */
export function decodeL2Entry(entry: bigint, clusterBytes: number, version: 2 | 3): L2Entry {
  if (entry === 0n) return { kind: "unallocated" };
  if ((entry & ENTRY_COMPRESSED) !== 0n) return decodeCompressedEntry(entry, clusterBytes);
  if ((entry & L2_RESERVED_MASK) !== 0n) throw badEntry("L2", entry, "reserved bits are set");
  const hostOffset = decodeOffset("L2", entry, clusterBytes);
  const isCopied = (entry & ENTRY_COPIED) !== 0n;
  if ((entry & L2_ZERO) !== 0n) {
    if (version === 2) throw badEntry("L2", entry, "a version 2 image has no zero clusters");
    return { kind: "zero", hostOffset, isCopied };
  }
  if (hostOffset === 0) return { kind: "unallocated" };
  return { kind: "data", hostOffset, isCopied };
}

function decodeCompressedEntry(entry: bigint, clusterBytes: number): L2Entry {
  if ((entry & ENTRY_COPIED) !== 0n) throw badEntry("L2", entry, "a compressed cluster is marked as copied");
  const shift = compressedSizeShift(clusterBytes);
  const offset = entry & ((1n << shift) - 1n);
  if (offset > BigInt(Number.MAX_SAFE_INTEGER)) throw badEntry("L2", entry, "its offset is not below 2^53");
  const hostOffset = Number(offset);
  const additionalSectors = Number((entry & (ENTRY_COMPRESSED - 1n)) >> shift);
  const length = (additionalSectors + 1) * SECTOR_BYTES - (hostOffset % SECTOR_BYTES);
  return { kind: "compressed", hostOffset, length };
}

/** Offset of a refcount block; 0 if there is none. Source: "Refcount table entry". */
export function decodeRefcountTableEntry(entry: bigint, clusterBytes: number): number {
  if ((entry & REFCOUNT_TABLE_RESERVED_MASK) !== 0n) throw badEntry("refcount table", entry, "reserved bits are set");
  return alignedOffset("refcount table", entry, entry, clusterBytes);
}

/** The `index`-th refcount of a block; entries have 2^`order` bits; those below 8 bits start at the low bit. */
export function decodeRefcount(block: Buffer, index: number, order: number): number {
  if (order >= 3) {
    const bytes = 2 ** (order - 3);
    const at = index * bytes;
    if (bytes <= 4) return block.readUIntBE(at, bytes);
    const value = block.readBigUInt64BE(at);
    return value > BigInt(Number.MAX_SAFE_INTEGER) ? Number.MAX_SAFE_INTEGER : Number(value);
  }
  const bits = 2 ** order;
  const bitAt = index * bits;
  return ((block[Math.floor(bitAt / 8)] ?? 0) >> (bitAt % 8)) & (2 ** bits - 1);
}

function decodeOffset(table: string, entry: bigint, clusterBytes: number): number {
  return alignedOffset(table, entry, entry & ENTRY_OFFSET_MASK, clusterBytes);
}

function alignedOffset(table: string, entry: bigint, offset: bigint, clusterBytes: number): number {
  if (offset % BigInt(clusterBytes) !== 0n) throw badEntry(table, entry, "its offset is not cluster-aligned");
  if (offset > BigInt(Number.MAX_SAFE_INTEGER)) throw badEntry(table, entry, "its offset is not below 2^53");
  return Number(offset);
}

function badEntry(table: string, entry: bigint, why: string): Qcow2FormatError {
  return new Qcow2FormatError(`Cannot use ${table} entry 0x${entry.toString(16).padStart(16, "0")}: ${why}`);
}
