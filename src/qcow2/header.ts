// SPDX-License-Identifier: AGPL-3.0-or-later
// The header and its extensions: bytes <-> value. Strict: an image that passes decodeQcow2Header() is
// a plain one that the reader understands completely.
import {
  Autoclear,
  CompressionType,
  Extension,
  HEADER_BYTES_V2,
  HEADER_BYTES_V3,
  HEADER_MIN_BYTES_V3,
  HeaderField,
  Incompatible,
  MAX_BACKING_FILE_BYTES,
  MAX_CLUSTER_BITS,
  MAX_L1_BYTES,
  MAX_REFCOUNT_ORDER,
  MAX_REFCOUNT_TABLE_BYTES,
  MAX_VIRTUAL_BYTES,
  MIN_CLUSTER_BITS,
  QCOW2_MAGIC,
  REFCOUNT_ORDER,
  TABLE_ENTRY_BYTES,
} from "./constants.ts";
import { Qcow2FormatError } from "./errors.ts";
import {
  type BackingReference,
  decodeBacking,
  decodeExtensions,
  encodeExtension,
  type Fail,
  failure,
} from "./header-extensions.ts";
import { l2CoverageBytes } from "./tables.ts";

/** The content of a header, checked. Offsets are in bytes from the start of the file. */
export interface Qcow2Header {
  readonly version: 2 | 3;
  readonly virtualBytes: number;
  readonly clusterBits: number;
  readonly clusterBytes: number;
  readonly l1Entries: number;
  readonly l1Offset: number;
  readonly refcountTableOffset: number;
  readonly refcountTableClusters: number;
  readonly refcountOrder: number;
  /** Codec of the compressed clusters, if there are any. */
  readonly compression: "zlib" | "zstd";
  readonly backing: BackingReference | undefined;
  /** The number of internal snapshots; the reader sees only the active state. */
  readonly snapshots: number;
  /** The refcounts may be stale ("lazy refcounts", not closed cleanly); the data is good. */
  readonly isDirty: boolean;
  readonly hasBitmaps: boolean;
  /** The header has the feature name table, which QEMU writes into every version 3 image. */
  readonly hasFeatureNames: boolean;
}

/** The fields that our writer chooses; everything else is fixed. */
export type NewHeader = Pick<
  Qcow2Header,
  "virtualBytes" | "clusterBits" | "l1Entries" | "l1Offset" | "refcountTableOffset" | "refcountTableClusters"
> & { readonly compression: "zlib" | "zstd"; readonly backing?: { readonly file: string; readonly format: string } };

/**
 * Encodes a version 3 header with its extensions and backing file name, as long as it needs to be. The
 * caller pads it with zeroes to a whole cluster.
 *
 * @throws Qcow2FormatError if a name is longer than the format allows, or does not fit into the first cluster
 */
export function encodeQcow2Header(header: NewHeader): Buffer {
  const fixed = Buffer.alloc(HEADER_BYTES_V3);
  fixed.writeUInt32BE(QCOW2_MAGIC, HeaderField.magic);
  fixed.writeUInt32BE(3, HeaderField.version);
  fixed.writeUInt32BE(header.clusterBits, HeaderField.clusterBits);
  fixed.writeBigUInt64BE(BigInt(header.virtualBytes), HeaderField.virtualBytes);
  fixed.writeUInt32BE(header.l1Entries, HeaderField.l1Entries);
  fixed.writeBigUInt64BE(BigInt(header.l1Offset), HeaderField.l1Offset);
  fixed.writeBigUInt64BE(BigInt(header.refcountTableOffset), HeaderField.refcountTableOffset);
  fixed.writeUInt32BE(header.refcountTableClusters, HeaderField.refcountTableClusters);
  fixed.writeUInt32BE(REFCOUNT_ORDER, HeaderField.refcountOrder);
  fixed.writeUInt32BE(HEADER_BYTES_V3, HeaderField.headerBytes);
  if (header.compression !== "zlib") {
    fixed.writeBigUInt64BE(Incompatible.compressionType, HeaderField.incompatible);
    fixed.writeUInt8(CompressionType[header.compression], HeaderField.compressionType);
  }
  const end = Buffer.alloc(8); // Extension.end, length 0
  if (header.backing === undefined) return Buffer.concat([fixed, end]);

  const name = Buffer.from(header.backing.file);
  const extension = encodeExtension(Extension.backingFormat, Buffer.from(header.backing.format));
  const nameOffset = fixed.length + extension.length + end.length;
  if (name.length === 0 || name.length > MAX_BACKING_FILE_BYTES || nameOffset + name.length > 2 ** header.clusterBits) {
    throw new Qcow2FormatError(
      `Cannot name backing file "${header.backing.file}": it has ${name.length} bytes, ` +
        `at most ${Math.min(MAX_BACKING_FILE_BYTES, 2 ** header.clusterBits - nameOffset)} fit a qcow2 header`,
    );
  }
  fixed.writeBigUInt64BE(BigInt(nameOffset), HeaderField.backingFileOffset);
  fixed.writeUInt32BE(name.length, HeaderField.backingFileBytes);
  return Buffer.concat([fixed, extension, end, name]);
}

/** The cluster size, once magic, version and limits are right; needs the first 72 bytes. */
export function decodeClusterBits(bytes: Buffer, path: string): number {
  const fail = failure(path);
  if (bytes.length < HEADER_BYTES_V2) throw fail(`it has only ${bytes.length} bytes, no qcow2 header fits`);
  const magic = bytes.readUInt32BE(HeaderField.magic);
  if (magic !== QCOW2_MAGIC) throw fail(`it is not a qcow2 image (magic 0x${magic.toString(16).padStart(8, "0")})`);
  const version = bytes.readUInt32BE(HeaderField.version);
  if (version !== 2 && version !== 3) throw fail(`its qcow2 version is ${version}, expected 2 or 3`);
  const clusterBits = bytes.readUInt32BE(HeaderField.clusterBits);
  if (clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    throw fail(`its cluster bits are ${clusterBits}, ${MIN_CLUSTER_BITS} to ${MAX_CLUSTER_BITS} are allowed`);
  }
  return clusterBits;
}

/**
 * Decodes a header.
 *
 * @param bytes the first cluster of the file, or the whole file if it is shorter
 * @param path for messages only
 * @throws Qcow2FormatError if a field is impossible, or the image has an external data file, encryption,
 *   extended L2 entries, an unknown incompatible feature, or is marked corrupt
 *
 * Source: QEMU docs/interop/qcow2, "Header".
 */
export function decodeQcow2Header(bytes: Buffer, path: string): Qcow2Header {
  const fail = failure(path);
  const clusterBits = decodeClusterBits(bytes, path);
  const clusterBytes = 2 ** clusterBits;
  const version = bytes.readUInt32BE(HeaderField.version) as 2 | 3;
  const v3 = version === 3 ? decodeV3Fields(bytes, clusterBytes, fail) : V2_FIELDS;
  const cryptMethod = bytes.readUInt32BE(HeaderField.cryptMethod);
  if (cryptMethod !== 0) throw fail(`it is encrypted (method ${cryptMethod}), expected a plain image`);

  const virtual = bytes.readBigUInt64BE(HeaderField.virtualBytes);
  if (virtual > BigInt(MAX_VIRTUAL_BYTES)) throw fail(`its virtual size ${virtual} is beyond every limit`);
  const virtualBytes = Number(virtual);
  const offsetAt = (field: number, what: string): number => {
    const value = bytes.readBigUInt64BE(field);
    if (value % BigInt(clusterBytes) !== 0n) throw fail(`its ${what} offset ${value} is not cluster-aligned`);
    if (value > BigInt(MAX_VIRTUAL_BYTES)) throw fail(`its ${what} offset ${value} is beyond every limit`);
    return Number(value);
  };
  const l1Entries = bytes.readUInt32BE(HeaderField.l1Entries);
  if (l1Entries * TABLE_ENTRY_BYTES > MAX_L1_BYTES) throw fail(`its L1 table has ${l1Entries} entries, too many`);
  if (l1Entries < Math.ceil(virtualBytes / l2CoverageBytes(clusterBytes))) {
    throw fail(`its L1 table has ${l1Entries} entries, too few for ${virtualBytes} bytes`);
  }
  const refcountTableClusters = bytes.readUInt32BE(HeaderField.refcountTableClusters);
  if (refcountTableClusters * clusterBytes > Math.max(MAX_REFCOUNT_TABLE_BYTES, clusterBytes)) {
    throw fail(`its refcount table has ${refcountTableClusters} clusters, too many`);
  }
  offsetAt(HeaderField.snapshotsOffset, "snapshot table"); // QEMU checks it even if there are no snapshots
  const extensions = decodeExtensions(bytes, v3.headerBytes, clusterBytes, fail);
  return {
    version,
    virtualBytes,
    clusterBits,
    clusterBytes,
    l1Entries,
    l1Offset: offsetAt(HeaderField.l1Offset, "L1 table"),
    refcountTableOffset: offsetAt(HeaderField.refcountTableOffset, "refcount table"),
    refcountTableClusters,
    refcountOrder: v3.refcountOrder,
    compression: v3.compression,
    backing: decodeBacking(bytes, extensions.backingFormat, clusterBytes, fail),
    snapshots: bytes.readUInt32BE(HeaderField.snapshots),
    isDirty: v3.isDirty,
    hasBitmaps: extensions.hasBitmaps,
    hasFeatureNames: extensions.hasFeatureNames,
  };
}

/**
 * True for images as Qcow2Writer leaves them, false for those that QEMU made: QEMU names the features in the header
 * and puts the refcount table first. Ours comes last, because the writer only ever appends to the file.
 */
export function isAppendedImage(header: Qcow2Header): boolean {
  return header.version === 3 && !header.hasFeatureNames && header.refcountTableOffset > header.l1Offset;
}

interface V3Fields {
  readonly headerBytes: number;
  readonly refcountOrder: number;
  readonly compression: "zlib" | "zstd";
  readonly isDirty: boolean;
}
const V2_FIELDS: V3Fields = {
  headerBytes: HEADER_BYTES_V2,
  refcountOrder: REFCOUNT_ORDER,
  compression: "zlib",
  isDirty: false,
};

function decodeV3Fields(bytes: Buffer, clusterBytes: number, fail: Fail): V3Fields {
  if (bytes.length < HEADER_MIN_BYTES_V3) throw fail(`it ends within its header, at byte ${bytes.length}`);
  const headerBytes = bytes.readUInt32BE(HeaderField.headerBytes);
  if (headerBytes < HEADER_MIN_BYTES_V3 || headerBytes > clusterBytes || headerBytes % 8 !== 0) {
    throw fail(`its header length ${headerBytes} is impossible`);
  }
  const features = bytes.readBigUInt64BE(HeaderField.incompatible);
  if ((features & Incompatible.corrupt) !== 0n) throw fail("it is marked corrupt");
  if ((features & Incompatible.externalDataFile) !== 0n) throw fail("it keeps its data in another file");
  if ((features & Incompatible.extendedL2) !== 0n) throw fail("it has extended L2 entries, expected standard ones");
  const unknown = features & ~(Incompatible.dirty | Incompatible.compressionType);
  if (unknown !== 0n) throw fail(`it has unknown incompatible features 0x${unknown.toString(16)}`);
  if ((bytes.readBigUInt64BE(HeaderField.autoclear) & Autoclear.rawExternalData) !== 0n) {
    throw fail("it says that its data is in another file");
  }
  const refcountOrder = bytes.readUInt32BE(HeaderField.refcountOrder);
  if (refcountOrder > MAX_REFCOUNT_ORDER) {
    throw fail(`its refcount order is ${refcountOrder}, at most ${MAX_REFCOUNT_ORDER} is allowed`);
  }
  const hasType = headerBytes > HeaderField.compressionType && bytes.length > HeaderField.compressionType;
  const type = hasType ? bytes.readUInt8(HeaderField.compressionType) : CompressionType.zlib;
  const isFlagged = (features & Incompatible.compressionType) !== 0n;
  if (type !== CompressionType.zlib && type !== CompressionType.zstd) throw fail(`its compression type is ${type}`);
  if (isFlagged !== (type !== CompressionType.zlib)) throw fail("its compression type and its feature bit disagree");
  return {
    headerBytes,
    refcountOrder,
    compression: type === CompressionType.zstd ? "zstd" : "zlib",
    isDirty: (features & Incompatible.dirty) !== 0n,
  };
}
