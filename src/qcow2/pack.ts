// SPDX-License-Identifier: AGPL-3.0-or-later
// Collects compressed clusters into one run of whole host clusters. Plain clusters bypass it, so that
// data that compresses badly in places does not leave half-empty clusters behind.
import { AlignedPool, type Slot } from "../block/index.ts";
import { alignUp, MIB } from "../core/index.ts";
import type { PackedCluster, TableBuilder } from "./table-builder.ts";

const PACK_BYTES = 4 * MIB;
/** One is filled while the other is on its way into the file. */
const PACK_SLOTS = 2;

/** The pack that is being filled. All its clusters belong to one L2 table. Dispose drops what was not flushed. */
export class Pack implements Disposable {
  readonly #tables: TableBuilder;
  readonly #clusterBytes: number;
  readonly #signal: AbortSignal;
  readonly #pool = new AlignedPool(PACK_BYTES, PACK_SLOTS);
  #slot: Slot | undefined;
  #clusters: PackedCluster[] = [];
  #used = 0;

  constructor(tables: TableBuilder, clusterBytes: number, signal: AbortSignal) {
    this.#tables = tables;
    this.#clusterBytes = clusterBytes;
    this.#signal = signal;
  }

  get isEmpty(): boolean {
    return this.#clusters.length === 0;
  }

  /** True if this pack must be flushed before anything at `guestOffset` is laid out. */
  mustFlushBefore(guestOffset: number): boolean {
    const first = this.#clusters[0];
    return first !== undefined && guestOffset >= this.#tables.tableEnd(first.guestOffset);
  }

  /** True if a stream of `length` bytes no longer fits. */
  isFull(length: number): boolean {
    return this.#used + length > PACK_BYTES;
  }

  /** Adds the stream of one cluster; `stream` is copied. */
  async add(guestOffset: number, stream: Buffer): Promise<void> {
    this.#slot ??= await this.#pool.acquire(this.#signal);
    stream.copy(this.#slot.bytes, this.#used);
    this.#clusters.push({ guestOffset, at: this.#used, length: stream.length });
    this.#used += stream.length;
  }

  /** Appends the pack to the file. */
  async flush(): Promise<void> {
    const slot = this.#slot;
    if (slot === undefined) return;
    const clusters = this.#clusters;
    const bytes = slot.bytes.subarray(0, alignUp(this.#used, this.#clusterBytes));
    bytes.fill(0, this.#used);
    this.#slot = undefined;
    this.#clusters = [];
    this.#used = 0;
    const { released } = await this.#tables.appendPack(bytes, clusters);
    released.then(slot.release, slot.release);
  }

  [Symbol.dispose](): void {
    this.#slot?.release();
    this.#slot = undefined;
    this.#clusters = [];
    this.#pool[Symbol.dispose]();
  }
}
