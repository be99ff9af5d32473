// SPDX-License-Identifier: AGPL-3.0-or-later
// One client of the server: its socket, its requests in flight, and when to stop reading from it. Whatever a client
// does ends at most its own connection.

import { setMaxListeners } from "node:events";
import type { Socket } from "node:net";
import { CancelledError, messageOf } from "../core/index.ts";
import { CommandType, ErrorValue } from "./constants.ts";
import { nextBuffer, type Receiver } from "./receiver.ts";
import type { BufferShare, ServerBuffers } from "./server-buffers.ts";
import { ExportFailure, type NbdExport } from "./server-export.ts";
import { type ChosenExport, serveHandshake } from "./server-options.ts";
import {
  type Answering,
  answerBlockStatus,
  answerRead,
  encodeFailure,
  readBufferBytes,
  STATUS_BUFFER_BYTES,
} from "./server-replies.ts";
import { checkRequest, receiveRequests } from "./server-requests.ts";
import type { NbdRequest } from "./wire.ts";

/** Where an export failed. */
export interface NbdReadPlace {
  readonly exportName: string;
  readonly offset: number;
  readonly length: number;
}

export interface ServerContext {
  readonly exports: ReadonlyMap<string, NbdExport>;
  readonly buffers: ServerBuffers;
  readonly requestsPerConnection: number;
  readonly handshakeTimeoutMs: number;
  readonly onError: (error: unknown, where: NbdReadPlace) => void;
}

export class ServerConnection {
  readonly #context: ServerContext;
  readonly #socket: Socket;
  readonly #receiver: Receiver<void>;
  /** Aborted when the socket is closed: its answers are no longer needed. */
  readonly #abort = new AbortController();
  readonly #share: BufferShare = { heldBytes: 0 };
  readonly #handshakeTimer: NodeJS.Timeout;
  /** Resolves when the socket is closed and no request is in flight. */
  readonly ended: Promise<void>;
  #resolveEnded: () => void = () => undefined;
  /** The bytes that are being received; undefined once nothing more is. */
  #wanted: Buffer | undefined;
  #filledBytes = 0;
  /** Bytes that have come but wait until there is room for requests. */
  #rest: Buffer | undefined;
  #chosen: ChosenExport | undefined;
  #inFlight = 0;
  /** Ends the wait for a buffer, during which no further request is read. */
  #stopWaiting: (() => void) | undefined;
  #isCorked = false;
  #isClosed = false;

  constructor(socket: Socket, context: ServerContext) {
    this.#context = context;
    this.#socket = socket;
    this.#receiver = this.#converse();
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
    setMaxListeners(0, this.#abort.signal); // every read in flight may listen
    socket.on("data", (bytes: Buffer) => this.#take(bytes));
    socket.on("drain", () => this.#proceed());
    socket.on("end", () => socket.destroy());
    socket.on("error", () => undefined); // "close" follows
    socket.on("close", () => this.#onClose());
    this.#handshakeTimer = setTimeout(() => socket.destroy(), context.handshakeTimeoutMs);
    this.#advance();
  }

  /** Closes the connection at once; `ended` says when that is done. */
  end(): void {
    this.#socket.destroy();
  }

  *#converse(): Receiver<void> {
    const send = (bytes: Buffer): void => void this.#socket.write(bytes);
    this.#chosen = yield* serveHandshake(send, this.#context.exports);
    if (this.#chosen === undefined) return this.#socket.destroySoon();
    clearTimeout(this.#handshakeTimer);
    const isPolite = yield* receiveRequests((request) => this.#accept(request));
    if (!isPolite) this.#socket.destroy();
  }

  #take(bytes: Buffer): void {
    this.#rest = this.#rest === undefined ? bytes : Buffer.concat([this.#rest, bytes]);
    this.#proceed();
  }

  /** Receives what has come, as far as there is room for requests; no more is read from the socket until there is. */
  #proceed(): void {
    while (this.#rest !== undefined && this.#wanted !== undefined && !this.#isHeld) {
      const copiedBytes = this.#rest.copy(this.#wanted, this.#filledBytes);
      this.#filledBytes += copiedBytes;
      this.#rest = copiedBytes < this.#rest.length ? this.#rest.subarray(copiedBytes) : undefined;
      if (this.#filledBytes === this.#wanted.length) this.#advance();
    }
    if (this.#wanted === undefined) this.#rest = undefined;
    if (this.#rest !== undefined) this.#socket.pause();
    else if (this.#socket.isPaused()) this.#socket.resume();
  }

  /** Lets the receiver use what it has, and gets the next buffer to fill from it. */
  #advance(): void {
    this.#filledBytes = 0;
    this.#wanted = nextBuffer(this.#receiver);
    if (this.#wanted === undefined) this.#endIfDone();
  }

  /** A client that does not read its replies is not read from. */
  get #isHeld(): boolean {
    if (this.#chosen === undefined) return this.#socket.writableNeedDrain;
    return this.#stopWaiting !== undefined || this.#inFlight >= this.#context.requestsPerConnection;
  }

  #accept(request: NbdRequest): void {
    const chosen = this.#chosen as ChosenExport;
    this.#inFlight++;
    const error = checkRequest(request, chosen);
    if (error !== 0) {
      const text = error === ErrorValue.Eperm ? "the export is read-only" : "the request is not valid for this export";
      void this.#refuse(request, error, text).then(() => this.#settle());
      return;
    }
    const isRead = request.type === CommandType.Read;
    const bytes = isRead ? readBufferBytes(request.length) : STATUS_BUFFER_BYTES;
    const { buffers } = this.#context;
    const buffer = buffers.take(this.#share, bytes);
    if (buffer !== undefined) return void this.#answer(request, chosen, buffer);
    this.#stopWaiting = buffers.wait(this.#share, bytes, (freed) => {
      this.#stopWaiting = undefined;
      void this.#answer(request, chosen, freed);
      this.#proceed();
    });
  }

  async #answer(request: NbdRequest, chosen: ChosenExport, buffer: Buffer): Promise<void> {
    const { signal } = this.#abort;
    const answering: Answering = { chosen, request, buffer, send: (parts) => this.#send(parts), signal };
    let isBegun = false;
    try {
      if (request.type === CommandType.BlockStatus) await answerBlockStatus(answering);
      else {
        await answerRead(answering, () => {
          isBegun = true;
        });
      }
    } catch (thrown) {
      if (!signal.aborted) await this.#fail(request, chosen, thrown, isBegun);
    } finally {
      this.#context.buffers.release(this.#share, buffer);
      this.#settle();
    }
  }

  async #fail(request: NbdRequest, chosen: ChosenExport, thrown: unknown, isBegun: boolean): Promise<void> {
    const { offset, length } = thrown instanceof ExportFailure ? thrown : request;
    const error = thrown instanceof ExportFailure ? thrown.cause : thrown;
    this.#context.onError(error, { exportName: chosen.export.name, offset, length });
    // The client was promised all bytes: only a lost connection tells it that they do not come.
    if (isBegun) this.#socket.destroy();
    else await this.#refuse(request, ErrorValue.Eio, messageOf(error));
  }

  #refuse({ cookie }: NbdRequest, error: number, text: string): Promise<void> {
    return this.#send([encodeFailure(this.#chosen?.hasStructuredReplies === true, cookie, error, text)]);
  }

  /** Replies that are ready at the same time leave in one system call. */
  #send(parts: readonly Buffer[]): Promise<void> {
    return new Promise((resolve) => {
      if (!this.#isCorked) {
        this.#isCorked = true;
        this.#socket.cork();
        process.nextTick(() => {
          this.#isCorked = false;
          this.#socket.uncork();
        });
      }
      const last = parts.length - 1;
      parts.forEach((part, index) => {
        this.#socket.write(part, index === last ? () => resolve() : undefined);
      });
    });
  }

  #settle(): void {
    this.#inFlight--;
    this.#proceed();
    this.#endIfDone();
  }

  #endIfDone(): void {
    if (this.#inFlight > 0) return;
    if (this.#isClosed) this.#resolveEnded();
    else if (this.#wanted === undefined) this.#socket.destroySoon();
  }

  #onClose(): void {
    this.#isClosed = true;
    this.#rest = undefined;
    this.#wanted = undefined;
    clearTimeout(this.#handshakeTimer);
    this.#abort.abort(new CancelledError("Cancelled because the NBD client hung up"));
    if (this.#stopWaiting !== undefined) {
      this.#stopWaiting();
      this.#stopWaiting = undefined;
      this.#inFlight--;
    }
    this.#endIfDone();
  }
}
