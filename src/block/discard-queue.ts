// SPDX-License-Identifier: AGPL-3.0-or-later
// Returns space to the fleecing image once its content has been safely copied.
import { type LogFunction, MIB } from "../core/index.ts";
import { type Extent, endOf } from "./extents.ts";

const DISCARD_BATCH_BYTES = 32 * MIB;

/** The source of a copy, as far as discards are concerned. */
interface DiscardOptions {
  readonly device: string;
  readonly source: {
    readonly canDiscard: boolean;
    discard(range: Extent, signal: AbortSignal): Promise<void>;
  };
  readonly log: LogFunction;
}

/** Ranges that were passed to the target; they are discarded in batches once the target has written them. */
export class DiscardQueue {
  readonly #options: DiscardOptions;
  readonly #signal: AbortSignal;
  readonly #queue: Extent[] = [];
  #pendingBytes = 0;
  #isOn: boolean;

  constructor(options: DiscardOptions, signal: AbortSignal) {
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

  /** Discards what lies below `watermark` if it is worth a request. Never makes the copy fail. */
  async advance(watermark: number): Promise<void> {
    if (!this.#isOn || this.#pendingBytes < DISCARD_BATCH_BYTES) return;
    while (this.#isOn) {
      const first = this.#queue[0];
      if (first === undefined || first.offset >= watermark) return;
      const length = Math.min(endOf(first), watermark) - first.offset;
      const isWhole = length === first.length;
      // The head of a long range waits until it is long enough by itself.
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
      // A fleecing image that keeps its space is no reason to lose the backup; the next read reveals a dead server.
      this.#isOn = false;
      const text = error instanceof Error ? error.message : String(error);
      this.#options.log("warn", `${this.#options.device}: no more discards of the fleecing image: ${text}`);
    }
  }
}
