// SPDX-License-Identifier: AGPL-3.0-or-later
// Copies one volume into one image: many reads in flight, zeroes found, writes in guest order,
// discards behind what is safely written.
import {
  type AlignedPool,
  type CopyCounters,
  type CopyStep,
  type Extent,
  endOf,
  ProgressReporter,
  planCopy,
  type Slot,
  type SourceExtent,
  type Throttle,
  zeroRuns,
} from "../block/index.ts";
import { MIB, orderedMap } from "../core/index.ts";
import type { LogFunction } from "./backup-provider.ts";

export const CLUSTER_BYTES = 64 * 1024;
/** Size of one read, and of one buffer. */
export const READ_BYTES = MIB;
export const READS_IN_FLIGHT = 16;
/** More than are read into: the rest is being compressed or written. */
export const POOL_SLOTS = 28;
const DISCARD_BATCH_BYTES = 32 * MIB;

/** What is copied. Implemented by NbdSource. */
export interface CopySource {
  readonly sizeBytes: number;
  readonly canDiscard: boolean;
  dirtyBytes(signal: AbortSignal): Promise<number>;
  extents(signal: AbortSignal): AsyncIterable<SourceExtent>;
  read(offset: number, target: Buffer, signal: AbortSignal): Promise<void>;
  discard(range: Extent, signal: AbortSignal): Promise<void>;
}

/** Where it goes. Implemented by Qcow2Writer. */
export interface CopyTarget {
  /** Calls come in guest order; `bytes` is borrowed until the promise settles. */
  writeData(guestOffset: number, bytes: Buffer): Promise<void>;
  writeZero(guestOffset: number, length: number): Promise<void>;
  /** What was handed in below this guest offset is completely in the file. */
  readonly writtenWatermark: number;
  readonly fileBytes: number;
}

/** Reads the state of the base; needed only for clusters that are dirty in part. */
export interface BaseReader {
  read(guestOffset: number, target: Buffer, signal: AbortSignal): Promise<void>;
}

export interface CopyOptions {
  readonly device: string;
  readonly source: CopySource;
  readonly target: CopyTarget;
  readonly base: BaseReader | undefined;
  readonly pool: AlignedPool;
  readonly throttle: Throttle;
  readonly log: LogFunction;
  readonly signal: AbortSignal;
}

export interface CopyResult extends CopyCounters {
  readonly summary: string;
}

/**
 * Copies every extent of the source. The target is complete but not finished: the caller closes it.
 *
 * @throws the first failure of source or target; all buffers are back in the pool by then
 */
export async function copyDevice(options: CopyOptions): Promise<CopyResult> {
  const abort = new AbortController();
  const signal = AbortSignal.any([options.signal, abort.signal]);
  const copy = new DeviceCopy(options, signal);
  try {
    return await copy.run();
  } catch (error) {
    abort.abort(error); // reads still in flight must not wait for a server that may be gone
    throw error;
  } finally {
    await copy.settle();
  }
}

interface ReadStep {
  readonly step: CopyStep;
  readonly slot: Slot | undefined;
}

class DeviceCopy {
  readonly #options: CopyOptions;
  readonly #signal: AbortSignal;
  readonly #counters: CopyCounters = { totalBytes: 0, doneBytes: 0, readBytes: 0, writtenBytes: 0, zeroBytes: 0 };
  readonly #writes = new Set<Promise<void>>();
  readonly #discards: DiscardQueue;
  #writeError: { readonly error: unknown } | undefined;

  constructor(options: CopyOptions, signal: AbortSignal) {
    this.#options = options;
    this.#signal = signal;
    this.#discards = new DiscardQueue(options, signal);
  }

  async run(): Promise<CopyResult> {
    const { source, target, device, log } = this.#options;
    const reporter = new ProgressReporter(device, performance.now());
    this.#counters.totalBytes = await source.dirtyBytes(this.#signal);
    const steps = planCopy(source.extents(this.#signal), {
      sizeBytes: source.sizeBytes,
      clusterBytes: CLUSTER_BYTES,
      maxReadBytes: READ_BYTES,
    });
    for await (const read of orderedMap(steps, READS_IN_FLIGHT, (step) => this.#read(step))) {
      this.#write(read);
      if (this.#writeError !== undefined) throw this.#writeError.error;
      this.#counters.writtenBytes = target.fileBytes;
      await this.#discards.advance(target.writtenWatermark);
      const line = reporter.update(this.#counters, performance.now());
      if (line !== undefined) log("info", line);
    }
    await Promise.all(this.#writes);
    if (this.#writeError !== undefined) throw this.#writeError.error;
    this.#counters.writtenBytes = target.fileBytes;
    return { ...this.#counters, summary: reporter.finish(this.#counters, performance.now()) };
  }

  /** Ends when no buffer of ours is in use any more. Never rejects. */
  async settle(): Promise<void> {
    await Promise.allSettled(this.#writes);
  }

  async #read(step: CopyStep): Promise<ReadStep> {
    if (step.kind === "zero") return { step, slot: undefined };
    const slot = await this.#options.pool.acquire(this.#signal);
    try {
      if (step.kind === "partial") await this.#readPartial(step, slot.bytes);
      else await this.#readPiece(step, slot.bytes, 0);
      return { step, slot };
    } catch (error) {
      slot.release();
      throw error;
    }
  }

  async #readPiece(piece: Extent, bytes: Buffer, at: number): Promise<void> {
    await this.#options.throttle.pass(piece.length, this.#signal);
    await this.#options.source.read(piece.offset, bytes.subarray(at, at + piece.length), this.#signal);
    this.#counters.readBytes += piece.length;
  }

  /** The base first, then over it what the source says: outside of that, reads would fail. */
  async #readPartial(step: Extract<CopyStep, { kind: "partial" }>, bytes: Buffer): Promise<void> {
    const cluster = bytes.subarray(0, step.length);
    if (this.#options.base === undefined) cluster.fill(0);
    else await this.#options.base.read(step.offset, cluster, this.#signal);
    for (const piece of step.extents) {
      const at = piece.offset - step.offset;
      if (piece.zero) cluster.fill(0, at, at + piece.length);
      else await this.#readPiece(piece, bytes, at);
    }
  }

  #write({ step, slot }: ReadStep): void {
    const { target } = this.#options;
    this.#counters.doneBytes +=
      step.kind === "partial" ? step.extents.reduce((sum, { length }) => sum + length, 0) : step.length;
    if (slot === undefined) {
      this.#counters.zeroBytes += step.length;
      this.#track([target.writeZero(step.offset, step.length)], undefined);
    } else {
      const writes: Promise<void>[] = [];
      for (const run of zeroRuns(slot.bytes.subarray(0, step.length), CLUSTER_BYTES)) {
        const offset = step.offset + run.offset;
        if (run.zero) {
          this.#counters.zeroBytes += run.length;
          writes.push(target.writeZero(offset, run.length));
        } else {
          writes.push(target.writeData(offset, slot.bytes.subarray(run.offset, endOf(run))));
        }
      }
      this.#track(writes, slot);
    }
    this.#discards.add(step.kind === "partial" ? step.extents : [step]);
  }

  /** The slot is free again when all that was made of it is in the file, or has failed. */
  #track(writes: readonly Promise<void>[], slot: Slot | undefined): void {
    const settled = Promise.allSettled(writes).then((results) => {
      slot?.release();
      const failed = results.find((result) => result.status === "rejected");
      if (failed !== undefined) this.#writeError ??= { error: failed.reason };
      this.#writes.delete(settled);
    });
    this.#writes.add(settled);
  }
}

/** Ranges that were handed to the target, discarded in batches once it has written them. */
class DiscardQueue {
  readonly #options: CopyOptions;
  readonly #signal: AbortSignal;
  readonly #queue: Extent[] = [];
  #pendingBytes = 0;
  #isOn: boolean;

  constructor(options: CopyOptions, signal: AbortSignal) {
    this.#options = options;
    this.#signal = signal;
    this.#isOn = options.source.canDiscard;
  }

  add(ranges: readonly Extent[]): void {
    if (!this.#isOn) return;
    for (const { offset, length } of ranges) {
      const last = this.#queue.at(-1);
      if (last !== undefined && endOf(last) === offset) {
        this.#queue[this.#queue.length - 1] = { offset: last.offset, length: last.length + length };
      } else {
        this.#queue.push({ offset, length });
      }
      this.#pendingBytes += length;
    }
  }

  /** Discards what lies below `watermark`, if it is worth a request. Never fails the copy. */
  async advance(watermark: number): Promise<void> {
    if (!this.#isOn || this.#pendingBytes < DISCARD_BATCH_BYTES) return;
    while (this.#isOn) {
      const first = this.#queue[0];
      if (first === undefined || first.offset >= watermark) return;
      const length = Math.min(endOf(first), watermark) - first.offset;
      const isWhole = length === first.length;
      // The head of a long range waits until it is long enough itself.
      if (!isWhole && length < DISCARD_BATCH_BYTES) return;
      if (isWhole) this.#queue.shift();
      else this.#queue[0] = { offset: first.offset + length, length: first.length - length };
      this.#pendingBytes -= length;
      await this.#discard({ offset: first.offset, length });
    }
  }

  async #discard(range: Extent): Promise<void> {
    try {
      await this.#options.source.discard(range, this.#signal);
    } catch (error) {
      this.#signal.throwIfAborted();
      // A fleecing image that keeps its space is no reason to lose the backup; a dead server shows at the next read.
      this.#isOn = false;
      const text = error instanceof Error ? error.message : String(error);
      this.#options.log("warn", `${this.#options.device}: no more discards of the fleecing image: ${text}`);
    }
  }
}
