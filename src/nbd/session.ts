// SPDX-License-Identifier: AGPL-3.0-or-later
// From an address to a running session: connect and handshake under one deadline and one signal.

import { checkAddress, describeAddress, type NbdAddress } from "./address.ts";
import { NbdChannel } from "./channel.ts";
import { NbdConnectionError } from "./errors.ts";
import type { Receiver, Send } from "./receiver.ts";

const DEFAULT_CONNECT_TIMEOUT_MS = 30_000;

interface SessionOptions {
  readonly address: NbdAddress;
  /** Time limit for connect and handshake together; 30 s if absent. */
  readonly connectTimeoutMs?: number;
  readonly signal: AbortSignal;
}

interface SessionPhases<T> {
  readonly handshake: (send: Send) => Receiver<T>;
  /** Runs from the end of the handshake on. */
  readonly transmission: (result: T) => Receiver<void>;
  /** Called once if the session dies, even while it is being opened. */
  readonly onFailure: (error: unknown) => void;
}

/**
 * Opens a channel and runs the handshake.
 *
 * @throws NbdConnectionError if no server listens, the server hangs up, or the deadline passes
 * @throws NbdProtocolError, NbdServerError as the handshake does; the reason of `signal` if aborted
 */
export function openSession<T>(
  options: SessionOptions,
  phases: SessionPhases<T>,
): Promise<{ readonly channel: NbdChannel; readonly result: T }> {
  const { address, signal, connectTimeoutMs = DEFAULT_CONNECT_TIMEOUT_MS } = options;
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    checkAddress(address);
    const stopWaiting = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", onAbort);
    };
    function* session(send: Send): Receiver<void> {
      const result = yield* phases.handshake(send);
      stopWaiting();
      resolve({ channel, result });
      yield* phases.transmission(result);
    }
    const channel = new NbdChannel(address, session, (error) => {
      stopWaiting();
      reject(error);
      phases.onFailure(error);
    });
    const onAbort = () => channel.fail(signal.reason);
    signal.addEventListener("abort", onAbort, { once: true });
    const timer = setTimeout(() => channel.fail(handshakeTimedOut(address, connectTimeoutMs)), connectTimeoutMs);
  });
}

function handshakeTimedOut(address: NbdAddress, timeoutMs: number): NbdConnectionError {
  const name = JSON.stringify(describeAddress(address));
  return new NbdConnectionError(
    `Cannot open NBD connection to ${name}: the handshake did not end within ${timeoutMs / 1000} s`,
    { errno: "ETIMEDOUT" },
  );
}
