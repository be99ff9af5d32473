// SPDX-License-Identifier: AGPL-3.0-or-later
// What this process asks the Perl side for, and its `log` notifications.
import { CancellationTokenSource, type MessageConnection, ParameterStructures } from "vscode-jsonrpc/node.js";
import type { LogLevel } from "../src/core/index.ts";
import { EnvironmentError, messageOf, oneLine } from "../src/core/index.ts";
import type { DirtyRegions, FileHandleCalls, Range } from "../src/provider/index.ts";
import { assertReverseParams, assertReverseResult } from "./validate.ts";

type WireRange = [offset: number, length: number];

/** Talks back to the shim on the connection that called us. */
export class ReverseCalls implements FileHandleCalls {
  readonly #connection: MessageConnection;

  constructor(connection: MessageConnection) {
    this.#connection = connection;
  }

  async nextDirtyRegions(device: string, max: number, timeoutMs: number, signal: AbortSignal): Promise<DirtyRegions> {
    const method = "next_dirty_regions";
    const answer = await this.#request(method, { device, max, seconds: Math.ceil(timeoutMs / 1000) }, signal);
    assertReverseResult(method, answer);
    const { regions, done } = answer as { regions: WireRange[]; done: boolean };
    return { regions: regions.map(([offset, length]) => ({ offset, length })), done };
  }

  async deallocate(device: string, ranges: readonly Range[], signal: AbortSignal): Promise<void> {
    const pairs = ranges.map(({ offset, length }): WireRange => [offset, length]);
    await this.#request("deallocate", { device, ranges: pairs }, signal);
  }

  /** Never fails: a line that cannot be delivered is lost. */
  log(level: LogLevel, message: string): void {
    this.#connection
      .sendNotification("log", ParameterStructures.byName, { level, message: oneLine(message) })
      .catch(() => undefined);
  }

  /** An abort of `signal` ends the wait at once: the Perl side may be gone, or hang in what it was asked. */
  async #request(method: string, params: object, signal: AbortSignal): Promise<unknown> {
    signal.throwIfAborted();
    assertReverseParams(method, params);
    const source = new CancellationTokenSource();
    let cancel = (): void => undefined;
    const aborted = new Promise<void>((resolve) => {
      cancel = () => {
        resolve();
        source.cancel();
      };
    });
    signal.addEventListener("abort", cancel, { once: true });
    try {
      const answer = this.#connection.sendRequest(method, ParameterStructures.byName, params, source.token);
      await Promise.race([answer, aborted]);
      signal.throwIfAborted();
      return await answer;
    } catch (error) {
      signal.throwIfAborted();
      throw new EnvironmentError(`Cannot run "${method}" on the Perl side: ${messageOf(error)}`, { cause: error });
    } finally {
      signal.removeEventListener("abort", cancel);
      source.dispose();
    }
  }
}
