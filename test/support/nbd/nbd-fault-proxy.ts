// SPDX-License-Identifier: AGPL-3.0-or-later
// Stands between an NBD client and a real server and makes one thing go wrong at one exact moment.
import { once } from "node:events";
import { rm } from "node:fs/promises";
import { connect, createServer, type Server, type Socket } from "node:net";
import { CMD_WRITE, DONE, errorChunk, OPT_GO, optionReply, REP_ACK } from "./nbd-bytes.ts";
import { SocketBytes } from "./socket-bytes.ts";

/** What the client does; connections count from 1, requests are those of the protocol. */
export type ClientStep =
  | { readonly kind: "connect"; readonly connection: number }
  | { readonly kind: "option"; readonly connection: number; readonly option: number }
  | {
      readonly kind: "request";
      readonly connection: number;
      readonly type: number;
      readonly cookie: bigint;
      readonly offset: number;
      readonly length: number;
    };

export interface FaultPlan {
  /** The moment: the first step for which this returns true is not passed on. */
  readonly at: (step: ClientStep) => boolean;
  /**
   * "hang": from now on nothing passes, in either direction, on any connection. "close": all connections end. An
   * error is the answer to that step alone: an errno, a reply type of an option; at "connect" it is nonsense.
   */
  readonly act: "hang" | "close" | { readonly error: number };
  /** Runs first, e.g. to end the real server. */
  readonly before?: () => Promise<void>;
}

const GREETING_BYTES = 18;
const OPTION_HEADER_BYTES = 16;
const OPTION_REPLY_HEADER_BYTES = 20;
const REQUEST_BYTES = 28;
const CHUNK_HEADER_BYTES = 20;
const SIMPLE_REPLY_BYTES = 16;
const SIMPLE_REPLY_MAGIC = 0x67446698;

export class NbdFaultProxy implements AsyncDisposable {
  readonly path: string;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #plan: FaultPlan;
  #connections = 0;
  #isReached = false;
  #isHanging = false;
  #preparing: Promise<void> | undefined;

  private constructor(path: string, target: () => string, plan: FaultPlan) {
    this.path = path;
    this.#plan = plan;
    this.#server = createServer((client) => void this.#serve(client, target()).catch(() => client.destroy()));
  }

  /** @param target path of the real server's socket, read at every connection */
  static async start(path: string, target: () => string, plan: FaultPlan): Promise<NbdFaultProxy> {
    await rm(path, { force: true });
    const proxy = new NbdFaultProxy(path, target, plan);
    proxy.#server.listen(path);
    await once(proxy.#server, "listening");
    return proxy;
  }

  /** Whether the moment has come. */
  get isReached(): boolean {
    return this.#isReached;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#preparing;
    this.#server.close();
    for (const socket of this.#sockets) socket.destroy();
    await rm(this.path, { force: true });
  }

  async #serve(client: Socket, target: string): Promise<void> {
    const connection = ++this.#connections;
    this.#watch(client);
    const verdict = await this.#judge({ kind: "connect", connection });
    if (verdict === "over") return;
    if (verdict !== "pass") return void client.end("HTTP/1.1 400 Bad Request\r\n\r\n");
    const server = connect(target);
    this.#watch(server);
    server.once("close", () => client.end());
    client.once("close", () => server.destroy());
    await Promise.all([
      this.#fromServer(new SocketBytes(server), client),
      this.#fromClient(connection, new SocketBytes(client), server, client),
    ]);
  }

  #watch(socket: Socket): void {
    this.#sockets.add(socket);
    socket.on("error", () => undefined);
    socket.once("close", () => this.#sockets.delete(socket));
  }

  /** Message by message, so that one of our answers never ends up inside one of the server's. */
  async #fromServer(received: SocketBytes, client: Socket): Promise<void> {
    this.#send(client, await received.take(GREETING_BYTES));
    for (let isTransmission = false; !isTransmission; ) {
      const header = await received.take(OPTION_REPLY_HEADER_BYTES);
      const data = await received.take(header.readUInt32BE(16));
      this.#send(client, Buffer.concat([header, data]));
      isTransmission = header.readUInt32BE(8) === OPT_GO && header.readUInt32BE(12) === REP_ACK;
    }
    for (;;) {
      const start = await received.take(SIMPLE_REPLY_BYTES); // QEMU's answer where there is no data and no error
      if (start.readUInt32BE(0) === SIMPLE_REPLY_MAGIC) {
        this.#send(client, start);
        continue;
      }
      const length = await received.take(CHUNK_HEADER_BYTES - SIMPLE_REPLY_BYTES);
      this.#send(client, Buffer.concat([start, length, await received.take(length.readUInt32BE(0))]));
    }
  }

  async #fromClient(connection: number, received: SocketBytes, server: Socket, client: Socket): Promise<void> {
    this.#send(server, await received.take(4)); // client flags
    for (let option = 0; option !== OPT_GO; ) {
      const header = await received.take(OPTION_HEADER_BYTES);
      const data = await received.take(header.readUInt32BE(12));
      option = header.readUInt32BE(8);
      const verdict = await this.#judge({ kind: "option", connection, option });
      if (verdict === "over") return;
      if (verdict === "pass") this.#send(server, Buffer.concat([header, data]));
      else this.#send(client, optionReply(option, verdict.error));
    }
    for (;;) {
      const header = await received.take(REQUEST_BYTES);
      const type = header.readUInt16BE(6);
      const cookie = header.readBigUInt64BE(8);
      const offset = Number(header.readBigUInt64BE(16));
      const length = header.readUInt32BE(24);
      const payload = await received.take(type === CMD_WRITE ? length : 0);
      const verdict = await this.#judge({ kind: "request", connection, type, cookie, offset, length });
      if (verdict === "over") return;
      if (verdict === "pass") this.#send(server, Buffer.concat([header, payload]));
      else this.#send(client, errorChunk(cookie, DONE, verdict.error, "injected"));
    }
  }

  /** What happens to a step. */
  async #judge(step: ClientStep): Promise<"pass" | "over" | { readonly error: number }> {
    const { act, at, before } = this.#plan;
    if (this.#isReached || !at(step)) return this.#isHanging ? "over" : "pass";
    this.#isReached = true;
    this.#preparing = before?.();
    await this.#preparing;
    if (typeof act === "object") return act;
    this.#isHanging = true;
    if (act === "close") {
      this.#server.close();
      for (const socket of this.#sockets) socket.destroy();
    }
    return "over";
  }

  #send(socket: Socket, message: Buffer): void {
    if (!this.#isHanging && socket.writable) socket.write(message);
  }
}
