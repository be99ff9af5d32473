// SPDX-License-Identifier: AGPL-3.0-or-later
// Lays out an image in an AppendFile: data in guest order, each L2 table after its data, a refcount
// block as soon as it is complete; L1, the remaining refcounts and the header at the end.
import type { Digest } from "../digest/index.ts";
import type { Appended, AppendFile } from "./append-file.ts";
import { HEAD_BYTES, TABLE_ENTRY_BYTES } from "./constants.ts";
import { decodeQcow2Header, encodeQcow2Header, type NewHeader } from "./header.ts";
import { RefcountBuilder } from "./refcount-builder.ts";
import { encodeCompressedEntry, encodeDataEntry, encodeL1Entry, encodeZeroEntry, l2CoverageBytes } from "./tables.ts";

/** One compressed cluster in a pack: its guest cluster, and its bytes within the pack. */
export interface PackedCluster {
  readonly guestOffset: number;
  readonly at: number;
  readonly length: number;
}

export type ImageShape = Pick<NewHeader, "virtualBytes" | "clusterBits" | "compression" | "backing">;

/** Calls must not overlap and must come in ascending guest order, one L2 table after another. */
export class TableBuilder {
  readonly #file: AppendFile;
  readonly #shape: ImageShape;
  readonly #clusterBytes: number;
  readonly #l2Bytes: number;
  readonly #refcounts: RefcountBuilder;
  readonly #l1: Buffer;
  readonly #l2: Buffer;
  #l2Index = -1;
  #isL2Used = false;

  constructor(file: AppendFile, shape: ImageShape) {
    this.#file = file;
    this.#shape = shape;
    this.#clusterBytes = 2 ** shape.clusterBits;
    this.#l2Bytes = l2CoverageBytes(this.#clusterBytes);
    this.#refcounts = new RefcountBuilder(this.#clusterBytes);
    this.#refcounts.add(0, this.#clusterBytes);
    // An empty disk gets a table, too: few readers test the case "no L1 table".
    this.#l1 = Buffer.alloc(Math.max(1, Math.ceil(shape.virtualBytes / this.#l2Bytes)) * TABLE_ENTRY_BYTES);
    this.#l2 = Buffer.alloc(this.#clusterBytes);
  }

  /** True if `guestOffset` belongs to a different L2 table than the clusters before. */
  isNewTable(guestOffset: number): boolean {
    return this.#l2Index >= 0 && Math.floor(guestOffset / this.#l2Bytes) !== this.#l2Index;
  }

  /** The first guest offset after the L2 table that `guestOffset` belongs to. */
  tableEnd(guestOffset: number): number {
    return (Math.floor(guestOffset / this.#l2Bytes) + 1) * this.#l2Bytes;
  }

  /** Appends data clusters; `bytes` must not cross an L2 table. A short last cluster is padded. */
  async appendData(guestOffset: number, bytes: Buffer): Promise<Appended> {
    await this.#select(guestOffset);
    const hostOffset = this.#file.position;
    const appended = await this.#file.append(bytes);
    await this.#file.pad(this.#clusterBytes);
    this.#refcounts.add(hostOffset, bytes.length);
    for (let at = 0; at < bytes.length; at += this.#clusterBytes) {
      this.#set(guestOffset + at, encodeDataEntry(hostOffset + at));
    }
    return appended;
  }

  /** Appends compressed clusters, all in the current L2 table; `pack` consists of whole clusters of the file. */
  async appendPack(pack: Buffer, clusters: readonly PackedCluster[]): Promise<Appended> {
    const first = clusters[0];
    if (first === undefined) throw new Error("unreachable: an empty pack");
    await this.#select(first.guestOffset);
    const hostOffset = this.#file.position;
    const appended = await this.#file.append(pack);
    for (const { guestOffset, at, length } of clusters) {
      this.#refcounts.add(hostOffset + at, length);
      this.#set(guestOffset, encodeCompressedEntry(hostOffset + at, length, this.#clusterBytes));
    }
    return appended;
  }

  /** Marks clusters as zero, so that a backing file does not show through; within one L2 table. */
  async markZero(guestOffset: number, length: number): Promise<void> {
    await this.#select(guestOffset);
    const end = Math.min(guestOffset + length, this.#shape.virtualBytes);
    for (let at = guestOffset; at < end; at += this.#clusterBytes) this.#set(at, encodeZeroEntry());
  }

  /** Writes all tables, then the header; after that the file is valid. */
  async finish(): Promise<Digest> {
    await this.#leaveTable();
    const l1Offset = this.#file.position;
    await this.#file.append(this.#l1);
    await this.#file.pad(this.#clusterBytes);
    this.#refcounts.add(l1Offset, this.#l1.length);

    const tail = this.#refcounts.finish(this.#file.position / this.#clusterBytes);
    for (const block of tail.blocks) await this.#file.append(block);
    await this.#file.append(tail.table);

    const header: NewHeader = {
      ...this.#shape,
      l1Entries: this.#l1.length / TABLE_ENTRY_BYTES,
      l1Offset,
      refcountTableOffset: tail.tableCluster * this.#clusterBytes,
      refcountTableClusters: tail.tableClusters,
    };
    const head = Buffer.alloc(HEAD_BYTES);
    encodeQcow2Header(header).copy(head);
    decodeQcow2Header(head.subarray(0, this.#clusterBytes), this.#file.path); // we must be able to read what we write
    return await this.#file.finish(head);
  }

  async #select(guestOffset: number): Promise<void> {
    const index = Math.floor(guestOffset / this.#l2Bytes);
    if (index !== this.#l2Index) {
      await this.#leaveTable();
      this.#l2Index = index;
    }
    await this.#appendCompleteBlocks();
  }

  #set(guestOffset: number, entry: bigint): void {
    this.#l2.writeBigUInt64BE(entry, ((guestOffset % this.#l2Bytes) / this.#clusterBytes) * TABLE_ENTRY_BYTES);
    this.#isL2Used = true;
  }

  async #leaveTable(): Promise<void> {
    if (!this.#isL2Used) return;
    const hostOffset = this.#file.position;
    await (await this.#file.append(this.#l2)).released;
    this.#refcounts.add(hostOffset, this.#clusterBytes);
    this.#l1.writeBigUInt64BE(encodeL1Entry(hostOffset), this.#l2Index * TABLE_ENTRY_BYTES);
    this.#l2.fill(0);
    this.#isL2Used = false;
    await this.#appendCompleteBlocks();
  }

  async #appendCompleteBlocks(): Promise<void> {
    for (;;) {
      const block = this.#refcounts.takeComplete(this.#file.position / this.#clusterBytes);
      if (block === undefined) return;
      await this.#file.append(block);
    }
  }
}
