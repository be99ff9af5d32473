// SPDX-License-Identifier: AGPL-3.0-or-later
// Connects the dispatcher to stdio. stdout is the channel: nothing else in this process may print there.
import {
  type CancellationToken,
  createMessageConnection,
  type MessageConnection,
  ResponseError,
  StreamMessageWriter,
} from "vscode-jsonrpc/node.js";
import { CancelledError } from "../src/core/index.ts";
import { reportInternalError } from "./diagnostics.ts";
import { Dispatcher, type ProviderTable } from "./dispatcher.ts";
import { isInternal, toRpcError } from "./error-map.ts";
import { FrameReader } from "./frame-reader.ts";
import { Lifecycle } from "./lifecycle.ts";
import { ReverseCalls } from "./reverse-calls.ts";

/** Serves the peer on stdin and stdout until it is gone; then ends the process. */
export function runBridge(providers: ProviderTable): void {
  // Backups hold secrets.
  process.umask(0o077);
  const connection = createMessageConnection(new FrameReader(process.stdin), new StreamMessageWriter(process.stdout));
  const reverse = new ReverseCalls(connection);
  const log = reverse.log.bind(reverse);
  const dispatcher = new Dispatcher({ providers, log, fileHandles: reverse });
  const lifecycle = new Lifecycle({
    cleanup: (reason) => dispatcher.end(reason),
    report: (error) => reportInternalError(error, "cleanup"),
  });
  lifecycle.watch();
  serve(connection, dispatcher);
  connection.onError(([error]) => {
    process.stderr.write(`Cannot continue: the connection to the Perl side is broken (${error.message})\n`);
    lifecycle.end("the connection to the Perl side is broken", 1);
  });
  connection.onClose(() => lifecycle.end("the Perl side closed the connection", 0));
  process.stdin.on("end", () => lifecycle.end("the Perl side closed the connection", 0));
  process.on("uncaughtException", (error) => void failHard(error, lifecycle));
  process.on("unhandledRejection", (error) => void failHard(error, lifecycle));
  connection.listen();
}

/** A bug outside of any request: the state is unknown, so the process ends, as orderly as it can. */
async function failHard(error: unknown, lifecycle: Lifecycle): Promise<void> {
  await reportInternalError(error, "none").catch(() => undefined);
  lifecycle.end("an internal error of the backup bridge", 1);
}

function serve(connection: MessageConnection, dispatcher: Dispatcher): void {
  connection.onRequest(async (method: string, params: unknown, token: CancellationToken) => {
    const controller = new AbortController();
    const cancel = () => controller.abort(new CancelledError(`Cancelled "${method}" on request`));
    if (token.isCancellationRequested) cancel();
    const listener = token.onCancellationRequested(cancel);
    try {
      return await dispatcher.dispatch(method, params, controller.signal);
    } catch (error) {
      if (isInternal(error)) await reportInternalError(error, method).catch(() => undefined);
      const { code, message, data } = toRpcError(error);
      return new ResponseError(code, message, data);
    } finally {
      listener.dispose();
    }
  });
}
