// SPDX-License-Identifier: AGPL-3.0-or-later
// Waits for the end of child processes; a cancelled job stops waiting at once.
import type { ChildProcess } from "./child-process.ts";

/** Waits for all of them. @throws the abort reason of `signal` at once; disposing the children is the caller's task */
export async function waitForChildren(children: readonly ChildProcess[], signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  let onAbort = (): void => undefined;
  const aborted = new Promise<void>((resolve) => {
    onAbort = () => resolve();
  });
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    await Promise.race([Promise.all(children.map((child) => child.exited)), aborted]);
    signal.throwIfAborted();
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
}
