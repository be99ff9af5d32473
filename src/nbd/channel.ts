// SPDX-License-Identifier: AGPL-3.0-or-later
// The socket: feeds bytes to a Receiver and sends what it is given. The first failure ends it.
// Pitfalls of net's `onread`: a zero-length buffer destroys the socket, `undefined` reads into the old
// buffer again, and a throw inside `buffer()` freezes the event loop; so none of the three happens here.

import { connect, type NetConnectOpts, type Socket } from "node:net";
import { errnoOf, messageOf } from "../core/index.ts";
import { describeAddress, type NbdAddress } from "./address.ts";
import { NbdConnectionError } from "./errors.ts";
import { nextBuffer, type Receiver, type Send } from "./receiver.ts";

/** How long a farewell may take before the socket is closed forcibly. */
const CLOSE_TIMEOUT_MS = 2_000;
/** Where bytes go that are no longer needed. */
const DISCARD_BYTES = 4096;
/** The error codes that show that the server's process ended while an answer was due. */
const GONE = new Set(["ECONNRESET", "EPIPE"]);

export class NbdChannel {
  readonly #address: NbdAddress;
  readonly #onFailure: (error: unknown) => void;
  readonly #receiver: Receiver<void>;
  readonly #socket: Socket;
  readonly #closed: Promise<void>;
  /** The buffer that is being filled; undefined once the receiver has ended. */
  #wanted: Buffer | undefined;
  #filledBytes = 0;
  #failure: { readonly error: unknown } | undefined;
  #closing: Promise<void> | undefined;
  /** performance.now() of the last byte from the server. */
  lastByteMs = performance.now();

  /**
   * Starts to connect. `makeReceiver` gets the function that sends; its receiver runs from the first
   * byte on. `onFailure` is called once, with the first failure; never after close().
   */
  constructor(address: NbdAddress, makeReceiver: (send: Send) => Receiver<void>, onFailure: (error: unknown) => void) {
    this.#address = address;
    this.#onFailure = onFailure;
    this.#receiver = makeReceiver((bytes) => this.send(bytes));
    this.#advance();
    const place: NetConnectOpts =
      address.transport === "unix" ? { path: address.path } : { host: address.host, port: address.port };
    this.#socket = connect({
      ...place,
      onread: { buffer: () => this.#nextBuffer(), callback: (filledBytes) => this.#take(filledBytes) },
    });
    this.#closed = new Promise((resolve) => this.#socket.once("close", () => resolve()));
    this.#socket.setNoDelay(true);
    this.#socket.on("error", (error) => this.fail(this.#lost(error)));
    this.#socket.on("end", () => this.fail(this.#hungUp()));
    this.#socket.on("close", () => this.fail(this.#hungUp()));
  }

  get failure(): { readonly error: unknown } | undefined {
    return this.#failure;
  }

  get isClosing(): boolean {
    return this.#closing !== undefined;
  }

  /** Queues `bytes`, and `payload` after them; both are borrowed until they have been sent. */
  send(bytes: Buffer, payload?: Uint8Array): void {
    if (this.#failure !== undefined || this.#closing !== undefined) return;
    if (payload !== undefined) this.#socket.cork();
    this.#socket.write(bytes);
    if (payload !== undefined) {
      this.#socket.write(payload);
      this.#socket.uncork();
    }
  }

  /** Ends the connection at once: after this call no byte goes into any buffer. The first call wins. */
  fail(error: unknown): void {
    if (this.#failure !== undefined) return;
    this.#failure = { error };
    this.#socket.destroy();
    if (this.#closing === undefined) this.#onFailure(error);
  }

  /** Sends `farewell` and waits, for a bounded time, for the server to hang up. Idempotent, never rejects. */
  close(farewell: Buffer): Promise<void> {
    this.#closing ??= this.#hangUp(farewell);
    return this.#closing;
  }

  async #hangUp(farewell: Buffer): Promise<void> {
    if (this.#failure === undefined && this.#socket.readyState === "open") {
      this.#socket.end(farewell);
      const timer = setTimeout(() => this.#socket.destroy(), CLOSE_TIMEOUT_MS);
      await this.#closed;
      clearTimeout(timer);
    } else {
      this.#socket.destroy();
      await this.#closed;
    }
  }

  #nextBuffer(): Buffer {
    return this.#wanted?.subarray(this.#filledBytes) ?? Buffer.allocUnsafe(DISCARD_BYTES);
  }

  #take(filledBytes: number): boolean {
    this.lastByteMs = performance.now();
    this.#filledBytes += filledBytes;
    if (this.#wanted !== undefined && this.#filledBytes >= this.#wanted.length) {
      try {
        this.#advance();
      } catch (error) {
        this.#wanted = undefined;
        this.fail(error);
      }
    }
    return true;
  }

  /** Lets the receiver use what it has, and gets the next buffer to fill from it. */
  #advance(): void {
    this.#filledBytes = 0;
    this.#wanted = nextBuffer(this.#receiver);
  }

  #lost(error: Error): NbdConnectionError {
    const errno = errnoOf(error);
    const isMidRun = this.#socket.bytesRead > 0;
    const state = isMidRun && GONE.has(errno ?? "") ? `it went away in mid-run (${errno})` : messageOf(error);
    const act = isMidRun ? "talk to" : "connect to";
    return new NbdConnectionError(`Cannot ${act} NBD server at ${this.#name}: ${state}`, { cause: error, errno });
  }

  #hungUp(): NbdConnectionError {
    return new NbdConnectionError(`Cannot talk to NBD server at ${this.#name}: it closed the connection`, {
      errno: "ECONNRESET",
    });
  }

  get #name(): string {
    return JSON.stringify(describeAddress(this.#address));
  }
}
