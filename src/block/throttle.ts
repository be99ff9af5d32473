// SPDX-License-Identifier: AGPL-3.0-or-later
// Keeps a copy below a number of bytes per second.
import { setTimeout as sleep } from "node:timers/promises";

/** After a stall the backlog is dropped; otherwise the copy would race to catch up with the average. */
const MAX_CREDIT_MS = 100;

/** Paces calls of `pass()`: over any longer period no more than `bytesPerSecond` get through. */
export class Throttle {
  readonly #bytesPerSecond: number;
  #dueMs = 0;

  /** @param bytesPerSecond 0 means no limit */
  constructor(bytesPerSecond: number) {
    this.#bytesPerSecond = bytesPerSecond;
  }

  /**
   * Resolves when `bytes` more may be read. Callers are served in call order.
   *
   * @throws the abort reason of `signal`
   */
  async pass(bytes: number, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (this.#bytesPerSecond <= 0) return;
    const nowMs = performance.now();
    this.#dueMs = Math.max(this.#dueMs, nowMs - MAX_CREDIT_MS);
    const startMs = this.#dueMs;
    this.#dueMs += (bytes / this.#bytesPerSecond) * 1000;
    if (startMs > nowMs) {
      await sleep(startMs - nowMs, undefined, { signal }).catch((error: unknown) => {
        signal.throwIfAborted(); // the reason, not Node's own AbortError
        throw error;
      });
    }
  }
}
