// SPDX-License-Identifier: AGPL-3.0-or-later
// The refcounts that an image records, read block by block, a bounded number of them in memory.

import type { RegularFile } from "../host/index.ts";
import type { ErrorList } from "./check-report.ts";
import { TABLE_ENTRY_BYTES } from "./constants.ts";
import { Qcow2FormatError } from "./errors.ts";
import { readTable } from "./file-io.ts";
import type { Qcow2Header } from "./header.ts";
import { decodeRefcount, decodeRefcountTableEntry } from "./tables.ts";

const CACHE_BYTES = 4 * 1024 * 1024;
const MIN_CACHED_BLOCKS = 2;

export class RecordedRefcounts {
  /** Host offset of each block; 0 if there is none. */
  readonly blockOffsets: readonly number[];
  readonly clustersPerBlock: number;
  readonly #file: RegularFile;
  readonly #header: Qcow2Header;
  readonly #blocks = new Map<number, Buffer>();

  private constructor(file: RegularFile, header: Qcow2Header, blockOffsets: readonly number[]) {
    this.#file = file;
    this.#header = header;
    this.blockOffsets = blockOffsets;
    this.clustersPerBlock = (header.clusterBytes * 8) / 2 ** header.refcountOrder;
  }

  /** Reads the refcount table (at most 8 MiB); unusable entries go to `errors` and count as absent. */
  static async open(file: RegularFile, header: Qcow2Header, errors: ErrorList): Promise<RecordedRefcounts> {
    const { clusterBytes } = header;
    const table = await readTable(file, header.refcountTableOffset, header.refcountTableClusters * clusterBytes);
    const offsets: number[] = [];
    for (let at = 0; at < table.length; at += TABLE_ENTRY_BYTES) {
      offsets.push(blockOffset(table.readBigUInt64BE(at), at / TABLE_ENTRY_BYTES, file, clusterBytes, errors));
    }
    return new RecordedRefcounts(file, header, offsets);
  }

  /** Numbers of the windows, of `clusters` clusters each, in which anything is counted. */
  windows(clusters: number): Set<number> {
    const windows = new Set<number>();
    for (const [index, offset] of this.blockOffsets.entries()) {
      if (offset === 0) continue;
      const last = (index + 1) * this.clustersPerBlock - 1;
      for (let at = index * this.clustersPerBlock; at <= last; at += clusters) windows.add(Math.floor(at / clusters));
      windows.add(Math.floor(last / clusters));
    }
    return windows;
  }

  /** The block that counts `cluster`; undefined if nothing is counted there. */
  async block(cluster: number): Promise<Buffer | undefined> {
    const index = Math.floor(cluster / this.clustersPerBlock);
    const cached = this.#blocks.get(index);
    if (cached !== undefined) return cached;
    const offset = this.blockOffsets[index] ?? 0;
    if (offset === 0) return undefined;
    const { clusterBytes } = this.#header;
    const block = await readTable(this.#file, offset, clusterBytes);
    this.#blocks.set(index, block);
    const limit = Math.max(MIN_CACHED_BLOCKS, Math.floor(CACHE_BYTES / clusterBytes));
    for (const oldest of this.#blocks.keys()) {
      if (this.#blocks.size <= limit) break;
      this.#blocks.delete(oldest);
    }
    return block;
  }

  /** The refcount of `cluster` in its block. */
  count(block: Buffer | undefined, cluster: number): number {
    return block === undefined ? 0 : decodeRefcount(block, cluster % this.clustersPerBlock, this.#header.refcountOrder);
  }
}

function blockOffset(entry: bigint, index: number, file: RegularFile, clusterBytes: number, errors: ErrorList): number {
  try {
    const offset = decodeRefcountTableEntry(entry, clusterBytes);
    if (offset + clusterBytes <= file.fileBytes) return offset;
    errors.add(`refcount block ${index} at ${offset} is outside the file of ${file.fileBytes} bytes`);
  } catch (error) {
    if (!(error instanceof Qcow2FormatError)) throw error;
    errors.add(`refcount block ${index}: ${error.message}`);
  }
  return 0;
}
