// SPDX-License-Identifier: AGPL-3.0-or-later
// Something to do again and again while a tool works.
import { setTimeout as sleep } from "node:timers/promises";

/**
 * Calls `action` every `everyMs`, never two at once, until disposed. Disposing waits for a running call.
 * An action that throws ends the timer; disposing throws its error then.
 */
export function startTimer(everyMs: number, action: () => Promise<void> | void): AsyncDisposable {
  const stop = new AbortController();
  const loop = async (): Promise<void> => {
    while (!stop.signal.aborted) {
      await sleep(everyMs, undefined, { signal: stop.signal }).catch(() => undefined);
      if (!stop.signal.aborted) await action();
    }
  };
  const running = loop().then(
    () => undefined,
    (error: unknown) => ({ error }),
  );
  let isDisposed = false;
  return {
    async [Symbol.asyncDispose]() {
      stop.abort();
      const failed = await running;
      if (isDisposed || failed === undefined) return;
      isDisposed = true;
      throw failed.error;
    },
  };
}
