// SPDX-License-Identifier: AGPL-3.0-or-later
// Copies one volume into one image: keeps many reads in flight, finds zeroes, writes in guest order, and
// discards what has been safely written.
import { setMaxListeners } from "node:events";
import type { LogFunction } from "../core/index.ts";
import { MIB, orderedMap } from "../core/index.ts";
import type { AlignedPool, Slot } from "./aligned-pool.ts";
import { CLUSTER_BYTES, type CopyContent, type CopyPiece, PlainContent } from "./copy-content.ts";
import { DiscardQueue } from "./discard-queue.ts";
import type { Extent, SourceExtent } from "./extents.ts";
import { type CopyCounters, ProgressReporter } from "./progress.ts";
import { type CopyStep, planCopy } from "./read-plan.ts";
import type { Throttle } from "./throttle.ts";

/** Size of one read, and of one buffer. */
export const READ_BYTES = MIB;
export const READS_IN_FLIGHT = 16;
/** More than reads in flight need: the others are being compressed or written. */
export const POOL_SLOTS = 28;

/** The source of a copy. Implemented by NbdSource and FileHandleSource. */
export interface CopySource {
  readonly sizeBytes: number;
  readonly canDiscard: boolean;
  dirtyBytes(signal: AbortSignal): Promise<number>;
  extents(signal: AbortSignal): AsyncIterable<SourceExtent>;
  read(offset: number, target: Buffer, signal: AbortSignal): Promise<void>;
  discard(range: Extent, signal: AbortSignal): Promise<void>;
}

/** The target of a copy. Implemented by Qcow2Writer. */
export interface CopyTarget {
  /** Calls come in guest order; `bytes` is borrowed until the promise settles. */
  writeData(guestOffset: number, bytes: Buffer): Promise<void>;
  writeZero(guestOffset: number, length: number): Promise<void>;
  /** Everything passed in below this guest offset is completely in the file. */
  readonly writtenWatermark: number;
  readonly fileBytes: number;
}

/** Reads the state of the base; needed only for clusters that are partly dirty. */
interface BaseReader {
  read(guestOffset: number, target: Buffer, signal: AbortSignal): Promise<void>;
}

export interface CopyOptions {
  readonly device: string;
  readonly source: CopySource;
  readonly target: CopyTarget;
  readonly base: BaseReader | undefined;
  /** Default: everything that is read is written. */
  readonly content?: CopyContent;
  readonly pool: AlignedPool;
  readonly throttle: Throttle;
  readonly log: LogFunction;
  /** Called once, with the bytes that the copy will process: the whole disk, or what changed. */
  readonly onStart?: (totalBytes: number) => void;
  readonly signal: AbortSignal;
}

interface CopyResult extends CopyCounters {
  readonly summary: string;
}

/**
 * Copies every extent of the source. After that the target is complete but not finished: the caller closes it.
 *
 * @throws the first failure of source or target; by then all buffers are back in the pool
 */
export async function copyDevice(options: CopyOptions): Promise<CopyResult> {
  const abort = new AbortController();
  const signal = AbortSignal.any([options.signal, abort.signal]);
  setMaxListeners(0, signal); // every read in flight listens; Node would warn of a leak
  const copy = new DeviceCopy(options, signal, (error) => abort.abort(error));
  try {
    return await copy.run();
  } finally {
    await copy.settle();
  }
}

interface ReadStep {
  readonly step: CopyStep;
  readonly slot: Slot | undefined;
  readonly pieces: readonly CopyPiece[];
}

class DeviceCopy {
  readonly #options: CopyOptions;
  readonly #signal: AbortSignal;
  readonly #content: CopyContent;
  readonly #counters: CopyCounters = {
    ...{ totalBytes: 0, doneBytes: 0, readBytes: 0, zeroBytes: 0, sameBytes: 0, writtenBytes: 0 },
  };
  readonly #writes = new Set<Promise<void>>();
  readonly #discards: DiscardQueue;
  readonly #slots = new Set<Slot>();
  /** The first failure ends everything: reads still in flight must not wait for a server that may be gone. */
  readonly #abort: (error: unknown) => void;

  constructor(options: CopyOptions, signal: AbortSignal, abort: (error: unknown) => void) {
    this.#options = options;
    this.#content = options.content ?? new PlainContent();
    this.#signal = signal;
    this.#abort = abort;
    this.#discards = new DiscardQueue(options, signal);
  }

  async run(): Promise<CopyResult> {
    try {
      return await this.#copy();
    } catch (error) {
      this.#abort(error);
      throw this.#signal.reason; // the first failure, not its consequences
    }
  }

  async #copy(): Promise<CopyResult> {
    const { source, target, device, log } = this.#options;
    const reporter = new ProgressReporter(device, source.sizeBytes, performance.now());
    this.#counters.totalBytes = await source.dirtyBytes(this.#signal);
    this.#options.onStart?.(this.#counters.totalBytes);
    for await (const read of orderedMap(this.#plan(), READS_IN_FLIGHT, (step) => this.#read(step))) {
      this.#write(read);
      this.#signal.throwIfAborted(); // a write may have failed
      this.#counters.writtenBytes = target.fileBytes;
      await this.#discards.advance(target.writtenWatermark);
      const line = reporter.update(this.#counters, performance.now());
      if (line !== undefined) log("info", line);
    }
    await Promise.all(this.#writes);
    this.#signal.throwIfAborted();
    this.#counters.writtenBytes = target.fileBytes;
    return { ...this.#counters, summary: reporter.finish(this.#counters, performance.now()) };
  }

  /** Ends when none of our buffers is in use any more. Never rejects. */
  async settle(): Promise<void> {
    await Promise.allSettled(this.#writes);
    for (const slot of this.#slots) slot.release(); // read, but never written
  }

  async *#plan(): AsyncGenerator<CopyStep, void, undefined> {
    const { source } = this.#options;
    try {
      yield* planCopy(source.extents(this.#signal), {
        sizeBytes: source.sizeBytes,
        clusterBytes: CLUSTER_BYTES,
        maxReadBytes: READ_BYTES,
      });
    } catch (error) {
      this.#abort(error);
      throw error;
    }
  }

  async #read(step: CopyStep): Promise<ReadStep> {
    if (step.kind === "zero") return { step, slot: undefined, pieces: await this.#split(step, undefined) };
    const slot = await this.#options.pool.acquire(this.#signal);
    this.#slots.add(slot);
    try {
      if (step.kind === "partial") await this.#readPartial(step, slot.bytes);
      else await this.#readPiece(step, slot.bytes, 0);
      return { step, slot, pieces: await this.#split(step, slot.bytes.subarray(0, step.length)) };
    } catch (error) {
      this.#abort(error);
      throw error;
    }
  }

  async #split(step: CopyStep, bytes: Buffer | undefined): Promise<readonly CopyPiece[]> {
    try {
      return await this.#content.split(step, bytes);
    } catch (error) {
      this.#abort(error);
      throw error;
    }
  }

  async #readPiece(piece: Extent, bytes: Buffer, at: number): Promise<void> {
    await this.#options.throttle.pass(piece.length, this.#signal);
    await this.#options.source.read(piece.offset, bytes.subarray(at, at + piece.length), this.#signal);
    this.#counters.readBytes += piece.length;
  }

  /** Reads the base first, then overwrites it with the source's extents: outside of those, reads would fail. */
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

  #write({ step, slot, pieces }: ReadStep): void {
    const { target } = this.#options;
    this.#counters.doneBytes +=
      step.kind === "partial" ? step.extents.reduce((sum, { length }) => sum + length, 0) : step.length;
    this.#discards.add(step.kind === "partial" ? step.extents : [step]);
    const writes: Promise<void>[] = [];
    for (const piece of pieces) {
      const { offset, length, kind } = piece;
      if (kind === "zero") this.#counters.zeroBytes += length;
      if (kind === "same") {
        this.#counters.sameBytes += length;
        continue;
      }
      this.#discards.hold(piece);
      writes.push(this.#content.record(piece));
      if (kind === "zero") writes.push(target.writeZero(offset, length));
      else if (slot !== undefined) {
        const at = offset - step.offset;
        writes.push(target.writeData(offset, slot.bytes.subarray(at, at + length)));
      }
    }
    this.#track(writes, slot);
  }

  /** The slot is free again when everything made from it is in the file or has failed. */
  #track(writes: readonly Promise<void>[], slot: Slot | undefined): void {
    const settled = Promise.allSettled(writes).then((results) => {
      slot?.release();
      if (slot !== undefined) this.#slots.delete(slot);
      const failed = results.find((result) => result.status === "rejected");
      if (failed !== undefined) this.#abort(failed.reason);
      this.#writes.delete(settled);
    });
    this.#writes.add(settled);
  }
}
