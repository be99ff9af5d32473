// SPDX-License-Identifier: AGPL-3.0-or-later
// Page-aligned buffers for O_DIRECT, visible to workers without a copy.
//
// A shared WebAssembly.Memory is the one page-aligned memory that Node hands out. It is never grown:
// growing would empty every view of it.
import { setMaxListeners } from "node:events";
import { CancelledError } from "../core/index.ts";

const WASM_PAGE_BYTES = 64 * 1024;

/** The part we use: TypeScript knows WebAssembly only together with the whole DOM. */
declare const WebAssembly: {
  Memory: new (pages: { initial: number; maximum: number; shared: true }) => { readonly buffer: SharedArrayBuffer };
};

/** One buffer of the pool. `bytes` belongs to the holder until release(). */
export interface Slot {
  readonly index: number;
  readonly bytes: Buffer;
  release(): void;
}

/** A fixed number of equal buffers; acquire() waits while all are taken. */
export class AlignedPool {
  readonly slotBytes: number;
  readonly memory: SharedArrayBuffer;
  readonly #free: number[] = [];
  readonly #waiting: Array<(index: number) => void> = [];

  /** @param slotBytes size of one buffer, rounded up to 64 KiB */
  constructor(slotBytes: number, slots: number) {
    this.slotBytes = Math.ceil(slotBytes / WASM_PAGE_BYTES) * WASM_PAGE_BYTES;
    const pages = (this.slotBytes / WASM_PAGE_BYTES) * slots;
    const wasm = new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true });
    this.memory = wasm.buffer;
    for (let index = slots - 1; index >= 0; index--) this.#free.push(index);
  }

  /**
   * Takes a buffer; its content is whatever the last holder left.
   *
   * @throws the abort reason of `signal` while it waits
   */
  async acquire(signal: AbortSignal): Promise<Slot> {
    signal.throwIfAborted();
    const index = this.#free.pop() ?? (await this.#wait(signal));
    let isHeld = true;
    return {
      index,
      bytes: Buffer.from(this.memory, index * this.slotBytes, this.slotBytes),
      release: () => {
        if (!isHeld) return;
        isHeld = false;
        const next = this.#waiting.shift();
        if (next === undefined) this.#free.push(index);
        else next(index);
      },
    };
  }

  #wait(signal: AbortSignal): Promise<number> {
    return new Promise((resolve, reject) => {
      const onAbort = (): void => {
        const at = this.#waiting.indexOf(give);
        if (at >= 0) this.#waiting.splice(at, 1);
        reject(signal.reason ?? new CancelledError("Cancelled while waiting for a buffer"));
      };
      const give = (index: number): void => {
        signal.removeEventListener("abort", onAbort);
        resolve(index);
      };
      setMaxListeners(0, signal); // many waiters are no leak: each one leaves
      signal.addEventListener("abort", onAbort, { once: true });
      this.#waiting.push(give);
    });
  }
}
