// SPDX-License-Identifier: AGPL-3.0-or-later
// When and how the process ends: end of input, signals, a parent that is gone; always within a
// bounded time.
import { constants } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";

const END_SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP"] as const;
/** How long children, mounts and staging directories have to go away. */
const CLEANUP_TIMEOUT_MS = 10_000;
/** A forked child of the parent may keep our input open: its end is then not a reliable sign. */
const PARENT_POLL_MS = 1_000;

interface LifecycleOptions {
  /** Releases everything; called once. Its failure ends the process with exit code 1. */
  readonly cleanup: (reason: string) => Promise<void>;
  /** Gets the failure of `cleanup`. */
  readonly report: (error: unknown) => Promise<void>;
}

export class Lifecycle {
  readonly #options: LifecycleOptions;
  readonly #parentPid = process.ppid;
  #isEnding = false;

  constructor(options: LifecycleOptions) {
    this.#options = options;
  }

  /** From now on signals and the loss of the parent end this process. */
  watch(): void {
    for (const signal of END_SIGNALS) process.on(signal, () => this.#onSignal(signal));
    setInterval(() => {
      if (process.ppid !== this.#parentPid) this.end("the process that started the backup bridge is gone", 0);
    }, PARENT_POLL_MS).unref();
  }

  /** Cleans up and exits; later calls change nothing. */
  end(reason: string, exitCode: number): void {
    if (this.#isEnding) return;
    this.#isEnding = true;
    void this.#endNow(reason, exitCode);
  }

  #onSignal(signal: (typeof END_SIGNALS)[number]): void {
    // The second one comes from a user who does not want to wait.
    if (this.#isEnding) process.exit(128 + constants.signals[signal]);
    this.end(`the backup bridge got ${signal}`, 128 + constants.signals[signal]);
  }

  async #endNow(reason: string, exitCode: number): Promise<void> {
    let code = exitCode;
    const cleanup = this.#options.cleanup(reason).catch(async (error: unknown) => {
      code = 1;
      await this.#options.report(error).catch(() => undefined);
    });
    await Promise.race([cleanup, sleep(CLEANUP_TIMEOUT_MS)]);
    process.exit(code);
  }
}
