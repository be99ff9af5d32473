// SPDX-License-Identifier: AGPL-3.0-or-later
// Reads messages for vscode-jsonrpc, in place of its own reader, which collects an endless header and waits for a
// body of any length.
import type { Readable } from "node:stream";
import { AbstractMessageReader, type DataCallback, type Disposable, type Message } from "vscode-jsonrpc/node.js";
import { FrameParser } from "./framing.ts";

export class FrameReader extends AbstractMessageReader {
  readonly #input: Readable;

  constructor(input: Readable) {
    super();
    this.#input = input;
  }

  /** Hands on each message in order. After an error nothing more is read. */
  override listen(callback: DataCallback): Disposable {
    const parser = new FrameParser();
    const stop = (): void => {
      this.#input.off("data", onData);
    };
    const onData = (bytes: Buffer): void => {
      try {
        for (const message of parser.feed(bytes)) callback(message as Message);
      } catch (error) {
        stop();
        this.fireError(error);
      }
    };
    this.#input.on("data", onData);
    this.#input.on("error", (error: Error) => this.fireError(error));
    this.#input.on("close", () => this.fireClose());
    return { dispose: stop };
  }
}
