// SPDX-License-Identifier: AGPL-3.0-or-later
// Page-aligned buffers for O_DIRECT, visible to workers without a copy.
//
// A shared WebAssembly.Memory is the only page-aligned memory that Node provides. It never grows: growing
// would empty every view of it. V8 does not count it and so is in no hurry to free it: the memories of
// disposed pools are kept and reused.
import { setMaxListeners } from "node:events";
import { CancelledError } from "../core/index.ts";

const WASM_PAGE_BYTES = 64 * 1024;

/** The part that we use: TypeScript knows WebAssembly only together with the whole DOM. */
declare const WebAssembly: {
  Memory: new (pages: { initial: number; maximum: number; shared: true }) => { readonly buffer: SharedArrayBuffer };
};

/** One buffer of the pool. `bytes` belongs to the holder until release(). */
export interface Slot {
  readonly index: number;
  readonly bytes: Buffer;
  release(): void;
}

interface Waiter {
  give(index: number): void;
  refuse(error: Error): void;
}

/** Memories of this process that no pool uses now, by size in bytes. */
const spareMemories = new Map<number, SharedArrayBuffer[]>();

/**
 * A fixed number of equal buffers; acquire() waits while all are taken. Dispose passes the memory on to a
 * later pool, but not before every buffer has been released.
 */
export class AlignedPool implements Disposable {
  readonly slotBytes: number;
  readonly memory: SharedArrayBuffer;
  readonly #free: number[] = [];
  readonly #waiting: Waiter[] = [];
  #held = 0;
  #isDisposed = false;

  /** @param slotBytes size of one buffer, rounded up to 64 KiB */
  constructor(slotBytes: number, slots: number) {
    this.slotBytes = Math.ceil(slotBytes / WASM_PAGE_BYTES) * WASM_PAGE_BYTES;
    this.memory = takeMemory(this.slotBytes * slots);
    for (let index = slots - 1; index >= 0; index--) this.#free.push(index);
  }

  /**
   * Takes a buffer; its content is whatever the last holder left there.
   *
   * @throws the abort reason of `signal` while it waits; an error once the pool is disposed
   */
  async acquire(signal: AbortSignal): Promise<Slot> {
    signal.throwIfAborted();
    if (this.#isDisposed) throw disposedError();
    const index = this.#takeFree() ?? (await this.#wait(signal));
    let isHeld = true;
    return {
      index,
      bytes: Buffer.from(this.memory, index * this.slotBytes, this.slotBytes),
      release: () => {
        if (!isHeld) return;
        isHeld = false;
        this.#takeBack(index);
      },
    };
  }

  [Symbol.dispose](): void {
    if (this.#isDisposed) return;
    this.#isDisposed = true;
    for (const waiter of this.#waiting.splice(0)) waiter.refuse(disposedError());
    this.#handOn();
  }

  #takeFree(): number | undefined {
    const index = this.#free.pop();
    if (index !== undefined) this.#held++;
    return index;
  }

  #takeBack(index: number): void {
    const next = this.#waiting.shift();
    if (next !== undefined) {
      next.give(index); // stays taken
      return;
    }
    this.#held--;
    this.#free.push(index);
    this.#handOn();
  }

  /** Whatever still holds a buffer, perhaps a write in flight, must remain its only user. */
  #handOn(): void {
    if (this.#isDisposed && this.#held === 0) keepMemory(this.memory);
  }

  #wait(signal: AbortSignal): Promise<number> {
    return new Promise((resolve, reject) => {
      const onAbort = (): void => {
        const at = this.#waiting.indexOf(waiter);
        if (at >= 0) this.#waiting.splice(at, 1);
        reject(signal.reason ?? new CancelledError("Cancelled while waiting for a buffer"));
      };
      const leave = (): void => signal.removeEventListener("abort", onAbort);
      const waiter: Waiter = {
        give: (index) => {
          leave();
          resolve(index);
        },
        refuse: (error) => {
          leave();
          reject(error);
        },
      };
      setMaxListeners(0, signal); // many waiters are not a leak: each one is removed again
      signal.addEventListener("abort", onAbort, { once: true });
      this.#waiting.push(waiter);
    });
  }
}

function takeMemory(bytes: number): SharedArrayBuffer {
  const spare = spareMemories.get(bytes)?.pop();
  if (spare !== undefined) return spare;
  const pages = bytes / WASM_PAGE_BYTES;
  return new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true }).buffer;
}

function keepMemory(memory: SharedArrayBuffer): void {
  const spares = spareMemories.get(memory.byteLength);
  if (spares === undefined) spareMemories.set(memory.byteLength, [memory]);
  else spares.push(memory);
}

const disposedError = (): Error => new Error("the buffer pool is disposed");
