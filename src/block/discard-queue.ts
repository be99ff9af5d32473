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

/** Ranges that were copied; they are discarded in batches once they are safe. */
export class DiscardQueue {
  readonly #options: DiscardOptions;
  readonly #signal: AbortSignal;
  readonly #queue: Extent[] = [];
  /** What the target has not written yet, ascending. */
  readonly #held: Extent[] = [];
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

  /** A range that the target writes: it is safe only below the watermark. Calls come in guest order. */
  hold(range: Extent): void {
    if (this.#isOn) this.#held.push(range);
  }

  /**
   * Discards what is safe, if it is worth a request: what lies below `watermark`, and what is not written at all
   * because the base has it. Never makes the copy fail.
   */
  async advance(watermark: number): Promise<void> {
    while (this.#isOn && this.#held[0] !== undefined && endOf(this.#held[0]) <= watermark) this.#held.shift();
    if (!this.#isOn || this.#pendingBytes < DISCARD_BATCH_BYTES) return;
    for (let index = 0; this.#isOn; ) {
      const range = this.#queue[index];
      if (range === undefined) return;
      const held = this.#held.find((one) => endOf(one) > range.offset);
      const safeEnd = held === undefined ? endOf(range) : Math.max(held.offset, watermark);
      const length = Math.min(endOf(range), safeEnd) - range.offset;
      const isWhole = length === range.length;
      // The head of a long range waits until it is long enough by itself.
      if (isWhole || length >= DISCARD_BATCH_BYTES) {
        if (isWhole) this.#queue.splice(index, 1);
        else this.#queue[index] = { offset: range.offset + length, length: range.length - length };
        this.#pendingBytes -= length;
        await this.#discard({ offset: range.offset, length });
        continue;
      }
      // What is held may wait for long; much that is safe behind it does not wait with it.
      const behind = held === undefined ? 0 : endOf(range) - endOf(held);
      if (held !== undefined && behind >= DISCARD_BATCH_BYTES) {
        const head = { offset: range.offset, length: range.length - behind };
        this.#queue.splice(index, 1, head, { offset: endOf(held), length: behind });
      }
      index++;
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
