// SPDX-License-Identifier: AGPL-3.0-or-later
// The wait from the start of a tool to its first answer.

import { setTimeout as sleep } from "node:timers/promises";
import { ChildProcessError } from "../core/index.ts";
import type { ChildProcess } from "../host/index.ts";

const POLL_MS = 10;

interface ServerWait {
  /** How the message of a failure begins: what cannot be done. */
  readonly act: string;
  /** The processes that must be running for an answer to come. */
  readonly servers: readonly ChildProcess[];
  readonly timeoutMs: number;
  readonly signal: AbortSignal;
}

/**
 * Asks until there is an answer; undefined and false mean "not yet". A question starts only after the previous one has
 * ended, because with a hanging server each would occupy a thread; a question may never end. Servers, time and `signal`
 * are watched meanwhile; a question that is given up ends with its server.
 *
 * @throws ChildProcessError if a server ends or the wait takes too long; what `ask` throws; the abort reason
 */
export async function waitUntilServed<T>(
  { act, servers, timeoutMs, signal }: ServerWait,
  ask: () => Promise<T | false | undefined>,
): Promise<T> {
  const deadline = performance.now() + timeoutMs;
  let asking: Promise<T | false | undefined> | undefined;
  for (;;) {
    signal.throwIfAborted();
    const gone = servers.find((server) => server.hasExited);
    if (gone !== undefined) throw new ChildProcessError(`${act}: ${gone.name} ${gone.describeExit()}`);
    if (performance.now() > deadline) {
      const names = servers.map(({ name }) => name).join(" and ");
      throw new ChildProcessError(`${act}: no answer from ${names} within ${timeoutMs / 1000} s`);
    }
    asking ??= ask().then((answer) => {
      if (answer === undefined || answer === false) asking = undefined;
      return answer;
    });
    const pause = sleep(POLL_MS);
    const answer = await Promise.race([asking, pause]);
    if (answer !== undefined && answer !== false) return answer;
    await pause;
  }
}
