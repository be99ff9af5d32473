// SPDX-License-Identifier: AGPL-3.0-or-later
// The appending qcow2 writer: checks and keeps the order of its calls, and poisons itself at the
// first error. ImageLayout decides the layout, AppendFile writes the bytes.
import { type Extent, splitAt } from "../block/index.ts";
import { CleanupStack, RequestError } from "../core/index.ts";
import type { Digest } from "../digest/index.ts";
import type { NewFile } from "../host/index.ts";
import { AppendFile } from "./append-file.ts";
import { type ClusterCompressor, type CompressedRun, createCompressor, MAX_COMPRESS_BYTES } from "./compressor.ts";
import { SECTOR_BYTES } from "./constants.ts";
import { type ClusterCounts, ImageLayout } from "./image-layout.ts";
import { planShape, type ShapeOptions } from "./plan-shape.ts";
import type { ImageShape } from "./table-builder.ts";

export interface Qcow2WriterOptions extends ShapeOptions {
  /** Created by the writer; must not exist. */
  readonly file: NewFile;
  /** Workers that are shared with other writers; without this the writer starts its own. */
  readonly compressor?: ClusterCompressor | undefined;
  readonly signal: AbortSignal;
}

export interface Qcow2Summary extends Readonly<ClusterCounts> {
  readonly fileBytes: number;
  /** Covers the bytes from 65536 to the end, then the first 65536. */
  readonly digest: Digest;
  /** As the header states it. */
  readonly virtualBytes: number;
}

/** A piece whose compression has started. */
interface Started {
  readonly extent: Extent;
  readonly bytes: Buffer;
  readonly run: Promise<CompressedRun>;
}

/**
 * Writes one image, in guest order. `await using`: without finish() the file is deleted.
 * After a failure every call, including finish(), rejects with that first error.
 */
export class Qcow2Writer implements AsyncDisposable {
  readonly path: string;
  readonly virtualBytes: number;
  readonly clusterBytes: number;
  readonly #file: AppendFile;
  readonly #layout: ImageLayout;
  readonly #compressor: ClusterCompressor | undefined;
  readonly #owned: CleanupStack;
  readonly #signal: AbortSignal;
  /** Settles when every call so far has been laid out; never rejects. */
  #order: Promise<unknown> = Promise.resolve();
  #acceptedEnd = 0;
  #failure: { readonly error: unknown } | undefined;

  private constructor(
    file: AppendFile,
    shape: ImageShape,
    compressor: ClusterCompressor | undefined,
    owned: CleanupStack,
    signal: AbortSignal,
  ) {
    this.path = file.path;
    this.virtualBytes = shape.virtualBytes;
    this.clusterBytes = 2 ** shape.clusterBits;
    this.#file = file;
    this.#layout = new ImageLayout(file, shape, signal);
    owned.defer(() => this.#layout[Symbol.dispose]());
    this.#compressor = compressor;
    this.#owned = owned;
    this.#signal = signal;
  }

  /**
   * Creates the file and, for compression without a shared compressor, the workers.
   *
   * @throws RequestError if a qcow2 header cannot hold a size or a name, EnvironmentError if the
   *   file exists or cannot be created
   */
  static async create(options: Qcow2WriterOptions): Promise<Qcow2Writer> {
    options.signal.throwIfAborted();
    const shape = planShape(options);
    await using owned = new CleanupStack();
    let compressor: ClusterCompressor | undefined;
    if (options.compression !== "none") {
      compressor = options.compressor ?? owned.use(await createCompressor(options.compression));
      if (compressor.kind !== options.compression) {
        throw new RequestError(`Cannot compress with ${options.compression}: the compressor makes ${compressor.kind}`);
      }
    }
    const file = owned.use(await AppendFile.create(options.file, shape.clusterBits >= 12, options.signal));
    return new Qcow2Writer(file, shape, compressor, owned.move(), options.signal);
  }

  /**
   * Everything passed in below this guest offset is completely in the file. It advances in steps of up to
   * some MiB in the file, and reaches the end with finish().
   */
  get writtenWatermark(): number {
    return this.#layout.writtenWatermark;
  }

  /** Size of the file so far, in bytes. */
  get fileBytes(): number {
    return this.#file.position;
  }

  /**
   * Accepts data. Calls come in ascending guest order and may overlap in time; offsets and lengths are
   * whole clusters, except at the end of the disk. `bytes` is borrowed until the promise settles;
   * page-aligned shared memory (AlignedPool) goes to the disk without a copy.
   *
   * @throws RequestError if order or alignment is wrong: that call has no effect
   * @throws EnvironmentError if this or an earlier write failed, or the abort reason
   */
  async writeData(guestOffset: number, bytes: Buffer): Promise<void> {
    const extent = { offset: guestOffset, length: bytes.length };
    this.#accept(extent);
    if (this.#compressor === undefined) await this.#writePlain(extent, bytes);
    else await this.#writeCompressed(extent, bytes, this.#compressor);
  }

  /** Accepts zeroes, of any length, in the same order. They hide the backing file, if there is one. */
  async writeZero(guestOffset: number, length: number): Promise<void> {
    const extent = { offset: guestOffset, length };
    this.#accept(extent);
    await this.#inOrder(() => this.#layout.placeZero(extent));
  }

  /** Writes the tables and, after an fsync, the header; after that the image is valid and durable. */
  async finish(): Promise<Qcow2Summary> {
    const digest = await this.#inOrder(() => this.#layout.finish());
    this.#failure = { error: new Error(`"${this.path}" is finished`) };
    await this.#owned[Symbol.asyncDispose]();
    return { fileBytes: this.#file.position, digest, virtualBytes: this.virtualBytes, ...this.#layout.counts };
  }

  /** Waits for what is in flight; without finish(), deletes the file. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#failure ??= { error: new Error(`"${this.path}" is closed`) };
    await this.#order;
    await this.#owned[Symbol.asyncDispose]();
  }

  /** Runs `act` when every earlier call has been laid out; if it fails, all later calls fail, too. */
  #inOrder<T>(act: () => Promise<T>): Promise<T> {
    const turn = this.#order.then(async () => {
      if (this.#failure !== undefined) throw this.#failure.error;
      try {
        this.#signal.throwIfAborted();
        return await act();
      } catch (error) {
        this.#failure ??= { error };
        throw error;
      }
    });
    this.#order = turn.catch(() => undefined);
    return turn;
  }

  #accept({ offset, length }: Extent): void {
    const end = offset + length;
    // A disk that ends within a sector may be passed in up to its own end.
    const isTail = end <= this.virtualBytes && this.virtualBytes - end < SECTOR_BYTES;
    const isWhole = offset % this.clusterBytes === 0 && (length % this.clusterBytes === 0 || isTail);
    if (!isWhole || length <= 0 || offset < this.#acceptedEnd || end > this.virtualBytes) {
      throw new RequestError(
        `Cannot write ${length} bytes at ${offset} of ${this.virtualBytes} to "${this.path}": ` +
          `expected whole clusters of ${this.clusterBytes} bytes from ${this.#acceptedEnd} on`,
      );
    }
    this.#acceptedEnd = end;
  }

  async #writePlain(extent: Extent, bytes: Buffer): Promise<void> {
    const released: Array<Promise<void>> = [];
    try {
      await this.#inOrder(() => this.#layout.placePlain(extent, bytes, released));
    } finally {
      await Promise.allSettled(released); // `bytes` is borrowed, even after a failure
    }
    await Promise.all(released);
  }

  /** The workers start at once; only the layout waits for its turn. */
  async #writeCompressed(extent: Extent, bytes: Buffer, compressor: ClusterCompressor): Promise<void> {
    const started: Started[] = [];
    for (const piece of splitAt(extent, MAX_COMPRESS_BYTES)) {
      const part = bytes.subarray(piece.offset - extent.offset, piece.offset - extent.offset + piece.length);
      const run = compressor.compress(part, this.clusterBytes, this.#signal);
      run.catch(() => undefined); // reported when its turn comes
      started.push({ extent: piece, bytes: part, run });
    }
    const released: Array<Promise<void>> = [];
    try {
      await this.#inOrder(async () => {
        for (const { extent: piece, bytes: part, run } of started) {
          const result = await run;
          await this.#layout.placeCompressed(piece, part, result, released);
          result.release();
        }
      });
    } finally {
      for (const { run } of started) {
        await run.then((result) => result.release()).catch(() => undefined);
      }
      await Promise.allSettled(released);
    }
    await Promise.all(released);
  }
}
