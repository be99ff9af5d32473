// SPDX-License-Identifier: AGPL-3.0-or-later
// Notices that a server hangs: commands wait and no byte arrives.

interface IdleWatchOptions {
  readonly timeoutMs: number;
  /** Time of the last byte, on the scale of performance.now(). */
  readonly lastByteMs: () => number;
  /** Whether bytes are expected; checked when the time is up. */
  readonly isWaiting: () => boolean;
  /** Called when bytes are expected and the last one is `timeoutMs` old. */
  readonly onIdle: () => void;
}

export class IdleWatch {
  readonly #options: IdleWatchOptions;
  #timer: NodeJS.Timeout | undefined;
  #armedMs = 0;

  constructor(options: IdleWatchOptions) {
    this.#options = options;
  }

  /** Bytes are expected from now on. Call this when the first command is sent; repeating it is cheap. */
  arm(): void {
    this.#armedMs = performance.now();
    if (this.#timer === undefined) this.#wakeIn(this.#options.timeoutMs);
  }

  disarm(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #leftMs(): number {
    return this.#options.timeoutMs - (performance.now() - Math.max(this.#armedMs, this.#options.lastByteMs()));
  }

  #wakeIn(delayMs: number): void {
    // The socket keeps the process alive, the timer need not.
    this.#timer = setTimeout(() => this.#wake(), Math.max(1, delayMs)).unref();
  }

  #wake(): void {
    if (!this.#options.isWaiting()) this.#timer = undefined;
    else if (this.#leftMs() > 0) this.#wakeIn(this.#leftMs());
    // It may be this process that was asleep. Let the event loop read what is waiting in the socket
    // before judging the server: immediates run after it has polled.
    else setImmediate(() => this.#judge());
  }

  #judge(): void {
    if (this.#timer === undefined) return;
    if (this.#options.isWaiting() && this.#leftMs() <= 0) {
      this.#timer = undefined;
      this.#options.onIdle();
    } else {
      this.#wake();
    }
  }
}
