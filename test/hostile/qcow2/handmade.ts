// SPDX-License-Identifier: AGPL-3.0-or-later
// A small sound image, written field by field from QEMU's docs/interop/qcow2, and what can be done to it.

export const MIB = 2 ** 20;
export const COPIED = 1n << 63n;
export const COMPRESSED = 1n << 62n;

/** Where things are in the image, in clusters: in QEMU's order, behind the header. */
export const REFCOUNT_TABLE = 1;
export const L1 = 2;
export const REFCOUNT_BLOCK = 3;
export const L2 = 4;
export const DATA = 5;
const CLUSTERS = 6;

export interface HandmadeOptions {
  readonly virtualBytes?: number;
  readonly clusterBits?: number;
  readonly backing?: string;
  readonly compressionType?: number;
}

/** The bytes of an image that are changed by hand. Offsets are bytes from the start of the file. */
export class Handmade {
  bytes: Buffer;
  readonly clusterBytes: number;

  /** One data cluster, at guest offset 0, filled with 0x44; everything else reads as zero. */
  constructor({ virtualBytes = MIB, clusterBits = 16, backing, compressionType = 0 }: HandmadeOptions = {}) {
    this.clusterBytes = 2 ** clusterBits;
    this.bytes = Buffer.alloc(CLUSTERS * this.clusterBytes);
    this.u32(0, 0x514649fb); // magic: "QFI\xfb"
    this.u32(4, 3); // version
    this.u32(20, clusterBits);
    this.u64(24, BigInt(virtualBytes)); // size
    const l2Covers = this.clusterBytes * (this.clusterBytes / 8);
    this.u32(36, Math.ceil(virtualBytes / l2Covers)); // l1_size, in entries
    this.u64(40, this.at(L1)); // l1_table_offset
    this.u64(48, this.at(REFCOUNT_TABLE)); // refcount_table_offset
    this.u32(56, 1); // refcount_table_clusters
    this.u32(96, 4); // refcount_order: 16 bits
    this.u32(100, 112); // header_length
    if (compressionType !== 0) this.u64(72, 1n << 3n).u8(104, compressionType); // incompatible: compression type
    if (backing !== undefined) this.back(backing);
    this.u64(this.at(L1), this.at(L2) | COPIED);
    this.u64(this.at(REFCOUNT_TABLE), this.at(REFCOUNT_BLOCK));
    for (let cluster = 0; cluster < CLUSTERS; cluster++) this.refcount(cluster, 1);
    this.u64(this.at(L2), this.at(DATA) | COPIED);
    this.bytes.fill(0x44, Number(this.at(DATA)));
  }

  /** Offset of a cluster. */
  at(cluster: number): bigint {
    return BigInt(cluster * this.clusterBytes);
  }

  u8(offset: number, value: number): this {
    this.bytes.writeUInt8(value, offset);
    return this;
  }

  u32(offset: number, value: number): this {
    this.bytes.writeUInt32BE(value, offset);
    return this;
  }

  u64(offset: number | bigint, value: bigint): this {
    this.bytes.writeBigUInt64BE(value, Number(offset));
    return this;
  }

  refcount(cluster: number, count: number): this {
    this.bytes.writeUInt16BE(count, Number(this.at(REFCOUNT_BLOCK)) + 2 * cluster);
    return this;
  }

  /** Backing file name and format, where QEMU puts them: behind the fixed header. */
  back(name: string, format = "qcow2"): this {
    this.extension(112, 0xe2792aca, Buffer.from(format));
    const offset = 112 + 8 + 8 * Math.ceil(format.length / 8) + 8; // the end of the extensions has 8 bytes
    this.u64(8, BigInt(offset)); // backing_file_offset
    this.u32(16, Buffer.byteLength(name)); // backing_file_size
    this.bytes.write(name, offset);
    return this;
  }

  /** type u32 | length u32 | data. */
  extension(offset: number, type: number, data: Buffer, length = data.length): this {
    this.u32(offset, type).u32(offset + 4, length);
    data.copy(this.bytes, offset + 8);
    return this;
  }

  /** Puts a compressed stream in place of the data cluster, with as many sectors as fit the cluster. */
  compress(stream: Buffer): this {
    const start = Number(this.at(DATA));
    this.bytes.fill(0, start);
    stream.subarray(0, this.clusterBytes).copy(this.bytes, start);
    const shift = 62n - (BigInt(Math.log2(this.clusterBytes)) - 8n);
    const sectors = BigInt(this.clusterBytes / 512 - 1);
    return this.u64(this.at(L2), COMPRESSED | (sectors << shift) | this.at(DATA));
  }

  /** Appends clusters of zeroes; `refcounts` of them all. */
  grow(clusters: number, refcount: number): this {
    const first = this.bytes.length / this.clusterBytes;
    this.bytes = Buffer.concat([this.bytes, Buffer.alloc(clusters * this.clusterBytes)]);
    for (let cluster = first; cluster < first + clusters; cluster++) this.refcount(cluster, refcount);
    return this;
  }
}
