// SPDX-License-Identifier: AGPL-3.0-or-later
// Refcounts of a file that only grows: a block is complete, and leaves memory, once the file has
// grown past what it covers.

import { REFCOUNT_BYTES, TABLE_ENTRY_BYTES } from "./constants.ts";
import { Qcow2FormatError } from "./errors.ts";

/** Where the refcount structures at the end of the file go; offsets and counts in clusters. */
interface RefcountTail {
  /** Blocks that are not written yet, in order; each is one cluster. */
  readonly blocks: readonly Buffer[];
  readonly table: Buffer;
  readonly tableCluster: number;
  readonly tableClusters: number;
}

const MAX_REFCOUNT = 2 ** (8 * REFCOUNT_BYTES) - 1;

/** Counts references to host clusters, 16 bits each. */
export class RefcountBuilder {
  readonly #clusterBytes: number;
  readonly #perBlock: number;
  /** Host cluster of each block that has been written. */
  readonly #written: number[] = [];
  /** Blocks in memory; the first is block number `#written.length`. */
  readonly #open: Buffer[] = [];

  constructor(clusterBytes: number) {
    this.#clusterBytes = clusterBytes;
    this.#perBlock = clusterBytes / REFCOUNT_BYTES;
  }

  /** Adds one reference to every cluster that the byte range touches. */
  add(offset: number, length: number): void {
    const end = Math.ceil((offset + length) / this.#clusterBytes);
    for (let cluster = Math.floor(offset / this.#clusterBytes); cluster < end; cluster++) {
      const block = this.#block(Math.floor(cluster / this.#perBlock));
      const at = (cluster % this.#perBlock) * REFCOUNT_BYTES;
      const count = block.readUInt16BE(at);
      if (count === MAX_REFCOUNT)
        throw new Qcow2FormatError(`Cannot refer to cluster ${cluster} more than ${count} times`);
      block.writeUInt16BE(count + 1, at);
    }
  }

  /**
   * The next complete block, if the file has grown past what it covers. The caller writes it to
   * host cluster `nextCluster`; this call counts the reference to that cluster.
   *
   * @param nextCluster the first cluster that is not used yet
   */
  takeComplete(nextCluster: number): Buffer | undefined {
    if (nextCluster < (this.#written.length + 1) * this.#perBlock) return undefined;
    const block = this.#block(this.#written.length);
    this.#open.shift();
    this.#written.push(nextCluster);
    this.add(nextCluster * this.#clusterBytes, this.#clusterBytes);
    return block;
  }

  /** Lays out the remaining blocks from `nextCluster` on, then the table, and counts their own clusters. */
  finish(nextCluster: number): RefcountTail {
    let blockCount = this.#written.length;
    let tableClusters = 0;
    for (;;) {
      const end = nextCluster + (blockCount - this.#written.length) + tableClusters;
      const wantedBlocks = Math.ceil(end / this.#perBlock);
      const wantedTable = Math.ceil((wantedBlocks * TABLE_ENTRY_BYTES) / this.#clusterBytes);
      if (wantedBlocks <= blockCount && wantedTable <= tableClusters) break;
      blockCount = Math.max(blockCount, wantedBlocks);
      tableClusters = Math.max(tableClusters, wantedTable);
    }
    const open = blockCount - this.#written.length;
    const tableCluster = nextCluster + open;
    this.add(nextCluster * this.#clusterBytes, (open + tableClusters) * this.#clusterBytes);
    const table = Buffer.alloc(tableClusters * this.#clusterBytes);
    for (let index = 0; index < blockCount; index++) {
      const cluster = this.#written[index] ?? nextCluster + index - this.#written.length;
      table.writeBigUInt64BE(BigInt(cluster * this.#clusterBytes), index * TABLE_ENTRY_BYTES);
    }
    const blocks = Array.from({ length: open }, (_, index) => this.#block(this.#written.length + index));
    return { blocks, table, tableCluster, tableClusters };
  }

  #block(index: number): Buffer {
    const at = index - this.#written.length;
    if (at < 0) throw new Error(`unreachable: refcount block ${index} is written`);
    while (this.#open.length <= at) this.#open.push(Buffer.alloc(this.#clusterBytes));
    return this.#open[at] as Buffer;
  }
}
