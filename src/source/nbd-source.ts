// SPDX-License-Identifier: AGPL-3.0-or-later
// One volume of a running backup, seen through QEMU's NBD export: which ranges to copy, their bytes,
// and the discard of what has been copied.
//
// Two connections, because a query that mixes the dirty bitmap with base:allocation fails outside
// the dirty ranges: the first asks only for the bitmap, the second for everything inside it.
import { type Extent, endOf, type SourceExtent, splitAt } from "../block/index.ts";
import { GIB, HostError, orderedMap, RequestError } from "../core/index.ts";
import { AllocationFlag, BASE_ALLOCATION, DirtyFlag, NbdConnection } from "../nbd/index.ts";
import type { VmVolume } from "../provider/index.ts";
import { explainMapRefusal, explainRefusal } from "./source-failure.ts";

/** Longest range of one block status query; the length field of NBD has 32 bits. */
const STATUS_MAX_BYTES = 2 * GIB;
/** Queries of single dirty ranges in flight at once: a map may have a million of them. */
const STATUS_IN_FLIGHT = 16;
/** Longest range of one discard: NBD requests, also those that nbdfuse makes, have 32 bits for it. */
export const DISCARD_MAX_BYTES = GIB;

export interface NbdTimeouts {
  readonly connectTimeoutMs: number;
  /** Longest silence of the server while an answer is due. */
  readonly replyTimeoutMs: number;
}

export class NbdSource implements AsyncDisposable {
  readonly sizeBytes: number;
  readonly #device: string;
  readonly #data: NbdConnection;
  /** Undefined if the whole disk is copied. */
  readonly #map: NbdConnection | undefined;
  readonly #bitmapContext: string;
  readonly #hasAllocation: boolean;

  private constructor(device: string, data: NbdConnection, map: NbdConnection | undefined, bitmapContext: string) {
    this.#device = device;
    this.#data = data;
    this.#map = map;
    this.#bitmapContext = bitmapContext;
    this.#hasAllocation = data.metaContexts.includes(BASE_ALLOCATION);
    this.sizeBytes = data.sizeBytes;
  }

  /**
   * Connects to the export named `device`.
   *
   * @throws RequestError if the export has a different size, or lacks the bitmap that `volume` names
   */
  static async open(device: string, volume: VmVolume, timeouts: NbdTimeouts, signal: AbortSignal): Promise<NbdSource> {
    if (volume.nbdPath === undefined) {
      throw new RequestError(`Cannot back up "${device}": PVE named no NBD socket for it`);
    }
    const target = {
      address: { transport: "unix", path: volume.nbdPath } as const,
      exportName: device,
      ...timeouts,
      signal,
    };
    const isReuse = volume.bitmapMode === "reuse";
    if (isReuse && volume.bitmapName === undefined) {
      throw new RequestError(`Cannot back up "${device}": PVE reuses a bitmap but does not name it`);
    }
    const bitmapContext = `qemu:dirty-bitmap:${volume.bitmapName}`;
    const data = await NbdConnection.open({ ...target, metaContexts: [BASE_ALLOCATION] });
    let map: NbdConnection | undefined;
    try {
      if (data.sizeBytes !== volume.size) {
        throw new RequestError(
          `Cannot back up "${device}": its NBD export has ${data.sizeBytes} bytes, PVE said ${volume.size}`,
        );
      }
      if (isReuse) {
        map = await NbdConnection.open({ ...target, metaContexts: [bitmapContext] });
        if (!map.metaContexts.includes(bitmapContext)) {
          throw new RequestError(
            `Cannot back up "${device}": QEMU does not offer the bitmap "${volume.bitmapName}" with its NBD export`,
          );
        }
      }
      return new NbdSource(device, data, map, bitmapContext);
    } catch (error) {
      await map?.[Symbol.asyncDispose]();
      await data[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** The number of bytes that are dirty in QEMU's bitmap, or the size of the disk; one pass over the map. */
  async dirtyBytes(signal: AbortSignal): Promise<number> {
    let sum = 0;
    for await (const range of this.dirtyRanges(signal)) sum += range.length;
    return sum;
  }

  /**
   * What must be copied, ascending; everything else is unchanged since the base and must not be
   * touched, or even queried. Only what the server flags as zero is `zero`.
   */
  async *extents(signal: AbortSignal): AsyncGenerator<SourceExtent, void, undefined> {
    const asked = orderedMap(this.dirtyRanges(signal), STATUS_IN_FLIGHT, (range) => this.#firstStatus(range, signal));
    for await (const { range, known } of asked) {
      yield* known;
      // The server may describe only the beginning of the range in question.
      let offset = known.reduce((_, extent) => endOf(extent), range.offset);
      while (offset < endOf(range)) {
        const rest = { offset, length: Math.min(endOf(range) - offset, STATUS_MAX_BYTES) };
        const next = await this.#allocation(rest, signal);
        yield* next;
        offset = next.reduce((_, extent) => endOf(extent), offset);
      }
    }
  }

  /** Fills `target` with the bytes at `offset`, which must lie inside the ranges of extents(). */
  async read(offset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    try {
      await this.#data.read(offset, target, signal);
    } catch (error) {
      throw explainRefusal(this.#device, error);
    }
  }

  get canDiscard(): boolean {
    return this.#data.canTrim;
  }

  /** Frees what the fleecing image holds of `range`. After that the range cannot be read again. */
  async discard(range: Extent, signal: AbortSignal): Promise<void> {
    for (const piece of splitAt(range, DISCARD_MAX_BYTES)) await this.#data.trim(piece.offset, piece.length, signal);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#map?.[Symbol.asyncDispose]();
    await this.#data[Symbol.asyncDispose]();
  }

  /** The dirty ranges of the bitmap, or the whole disk; ascending; neighbours are not always joined. */
  async *dirtyRanges(signal: AbortSignal): AsyncGenerator<Extent, void, undefined> {
    if (this.#map === undefined) {
      for (let offset = 0; offset < this.sizeBytes; offset += STATUS_MAX_BYTES) {
        yield { offset, length: Math.min(STATUS_MAX_BYTES, this.sizeBytes - offset) };
      }
      return;
    }
    let held: Extent | undefined;
    let offset = 0;
    while (offset < this.sizeBytes) {
      const length = Math.min(STATUS_MAX_BYTES, this.sizeBytes - offset);
      const status = await this.#map.blockStatus(offset, length, signal).catch((error: unknown) => {
        throw explainMapRefusal(this.#device, error);
      });
      const extents = this.#mustKnow(status.get(this.#bitmapContext), offset);
      for (const extent of extents) {
        offset = endOf(extent);
        if ((extent.flags & DirtyFlag.Dirty) === 0) continue;
        if (held !== undefined && endOf(held) === extent.offset && held.length + extent.length <= STATUS_MAX_BYTES) {
          held = { offset: held.offset, length: held.length + extent.length };
          continue;
        }
        if (held !== undefined) yield held;
        held = { offset: extent.offset, length: extent.length };
      }
    }
    if (held !== undefined) yield held;
  }

  async #firstStatus(range: Extent, signal: AbortSignal): Promise<{ range: Extent; known: SourceExtent[] }> {
    return { range, known: await this.#allocation(range, signal) };
  }

  async #allocation(range: Extent, signal: AbortSignal): Promise<SourceExtent[]> {
    if (!this.#hasAllocation) return [{ ...range, zero: false }];
    const status = await this.#data.blockStatus(range.offset, range.length, signal).catch((error: unknown) => {
      throw explainRefusal(this.#device, error);
    });
    return this.#mustKnow(status.get(BASE_ALLOCATION), range.offset).map(({ offset, length, flags }) => ({
      offset,
      length,
      zero: (flags & AllocationFlag.Zero) !== 0, // a hole that is not flagged as zero may hold anything
    }));
  }

  /** An answer without a single extent says nothing; it must never count as "clean". */
  #mustKnow<T>(extents: readonly T[] | undefined, offset: number): readonly T[] {
    if (extents === undefined || extents.length === 0) {
      throw new SourceMapError(
        `Cannot read the block map of "${this.#device}": QEMU says nothing about offset ${offset}`,
      );
    }
    return extents;
  }
}

class SourceMapError extends HostError {
  override readonly code = "SOURCE";
}
