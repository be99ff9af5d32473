// SPDX-License-Identifier: AGPL-3.0-or-later
// Decides which kind of cluster each piece becomes and in which order things reach the file.
// Calls must not overlap and must come in guest order; the writer ensures that.
import { type Extent, splitAt } from "../block/index.ts";
import type { Digest } from "../digest/index.ts";
import type { AppendFile } from "./append-file.ts";
import type { CompressedRun } from "./compressor.ts";
import { Pack } from "./pack.ts";
import { type ImageShape, TableBuilder } from "./table-builder.ts";
import { l2CoverageBytes } from "./tables.ts";
import { Watermark } from "./watermark.ts";

/** Cluster counts by kind. */
export interface ClusterCounts {
  dataClusters: number;
  compressedClusters: number;
  zeroClusters: number;
}

/** Settles when the bytes that were passed in belong to the caller again. */
type Released = Promise<void>;

export class ImageLayout implements Disposable {
  readonly counts: ClusterCounts = { dataClusters: 0, compressedClusters: 0, zeroClusters: 0 };
  readonly #file: AppendFile;
  readonly #tables: TableBuilder;
  readonly #pack: Pack;
  readonly #clusterBytes: number;
  readonly #hasBacking: boolean;
  readonly #watermark = new Watermark();
  #guestEnd = 0;

  constructor(file: AppendFile, shape: ImageShape, signal: AbortSignal) {
    this.#file = file;
    this.#clusterBytes = 2 ** shape.clusterBits;
    this.#hasBacking = shape.backing !== undefined;
    this.#tables = new TableBuilder(file, shape);
    this.#pack = new Pack(this.#tables, this.#clusterBytes, signal);
  }

  /** Everything laid out below this guest offset is completely in the file. */
  get writtenWatermark(): number {
    return this.#watermark.guestEnd(this.#file.writtenBelow);
  }

  /** Appends data clusters uncompressed. Adds to `released` even if it fails halfway. */
  async placePlain(extent: Extent, bytes: Buffer, released: Released[]): Promise<void> {
    for (const piece of splitAt(extent, l2CoverageBytes(this.#clusterBytes))) {
      await this.#leavePackFor(piece.offset);
      const at = piece.offset - extent.offset;
      const appended = await this.#tables.appendData(piece.offset, bytes.subarray(at, at + piece.length));
      released.push(appended.released);
      this.counts.dataClusters += Math.ceil(piece.length / this.#clusterBytes);
    }
    this.#laidOut(extent);
  }

  /** Packs the streams of `run`; appends clusters without a stream uncompressed. */
  async placeCompressed(extent: Extent, bytes: Buffer, run: CompressedRun, released: Released[]): Promise<void> {
    let streamAt = 0;
    for (let index = 0; index < run.sizes.length; ) {
      const at = index * this.#clusterBytes;
      const size = run.sizes[index] as number;
      if (size === 0) {
        const count = plainCount(run.sizes, index);
        const length = Math.min(count * this.#clusterBytes, bytes.length - at);
        await this.placePlain({ offset: extent.offset + at, length }, bytes.subarray(at, at + length), released);
        index += count;
        continue;
      }
      await this.#leavePackFor(extent.offset + at);
      if (this.#pack.isFull(size)) await this.#flushPack();
      await this.#pack.add(extent.offset + at, run.bytes.subarray(streamAt, streamAt + size));
      this.counts.compressedClusters++;
      streamAt += size;
      index++;
    }
    this.#laidOut(extent);
  }

  /** Writes zero clusters over a backing file; without one, nothing: what is absent reads as zero. */
  async placeZero(extent: Extent): Promise<void> {
    if (this.#hasBacking) {
      for (const piece of splitAt(extent, l2CoverageBytes(this.#clusterBytes))) {
        await this.#leavePackFor(piece.offset);
        await this.#tables.markZero(piece.offset, piece.length);
      }
      this.counts.zeroClusters += Math.ceil(extent.length / this.#clusterBytes);
    }
    this.#laidOut(extent);
  }

  async finish(): Promise<Digest> {
    await this.#flushPack();
    return await this.#tables.finish();
  }

  [Symbol.dispose](): void {
    this.#pack[Symbol.dispose]();
  }

  /** A pack goes into the file before anything that belongs to the next L2 table. */
  async #leavePackFor(guestOffset: number): Promise<void> {
    if (this.#pack.mustFlushBefore(guestOffset)) await this.#flushPack();
  }

  async #flushPack(): Promise<void> {
    await this.#pack.flush();
    this.#watermark.add(this.#guestEnd, this.#file.position);
  }

  #laidOut(extent: Extent): void {
    this.#guestEnd = extent.offset + extent.length;
    if (this.#pack.isEmpty) this.#watermark.add(this.#guestEnd, this.#file.position);
  }
}

/** How many clusters from `start` on have no stream. */
function plainCount(sizes: readonly number[], start: number): number {
  let end = start;
  while (sizes[end] === 0) end++;
  return end - start;
}
