// SPDX-License-Identifier: AGPL-3.0-or-later
// Our server on a socket in a scratch directory, and clients that speak to it in bytes.
import { once } from "node:events";
import { connect, type Socket } from "node:net";
import type { NbdAddress } from "../../../src/nbd/address.ts";
import { type NbdExport, NbdServer } from "../../../src/nbd/index.ts";
import type { NbdServerLimits } from "../../../src/nbd/server.ts";
import type { NbdReadPlace } from "../../../src/nbd/server-connection.ts";
import { clientFlags, contextOption, goOption, OPT_GO, OPT_SET_META_CONTEXT, option } from "./nbd-bytes.ts";
import { scratchFolder } from "./nbd-servers.ts";
import { SocketBytes } from "./socket-bytes.ts";

export interface Served extends AsyncDisposable {
  readonly path: string;
  readonly address: NbdAddress;
  readonly server: NbdServer;
  /** What onError() was called with. */
  readonly errors: { readonly error: unknown; readonly where: NbdReadPlace }[];
}

export async function serve(exports: readonly NbdExport[], limits: NbdServerLimits = {}): Promise<Served> {
  const folder = await scratchFolder();
  const path = folder.file("s");
  const errors: { error: unknown; where: NbdReadPlace }[] = [];
  const onError = (error: unknown, where: NbdReadPlace): void => void errors.push({ error, where });
  const server = await NbdServer.listen({ path, exports, onError, limits });
  return {
    ...{ path, address: { transport: "unix", path }, server, errors },
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      await folder[Symbol.asyncDispose]();
    },
  };
}

export class RawClient implements Disposable {
  readonly socket: Socket;
  readonly #bytes: SocketBytes;

  private constructor(socket: Socket) {
    this.socket = socket;
    this.#bytes = new SocketBytes(socket);
  }

  static async connect(path: string): Promise<RawClient> {
    const socket = connect({ path });
    await once(socket, "connect");
    return new RawClient(socket);
  }

  /** Connects and opens `name`, by NBD_OPT_GO; what the server says until then is dropped. */
  static async open(path: string, name: string, structured: boolean): Promise<RawClient> {
    const client = await RawClient.connect(path);
    client.send(clientFlags());
    await client.take(18);
    if (structured) {
      client.send(option(8), contextOption(OPT_SET_META_CONTEXT, name, "base:allocation"));
      for (let left = 3; left > 0; left--) await client.takeOptionReply();
    }
    client.send(goOption(OPT_GO, name));
    for (let left = 2; left > 0; left--) await client.takeOptionReply();
    return client;
  }

  send(...parts: Buffer[]): void {
    this.socket.write(Buffer.concat(parts));
  }

  /** @throws HungUpError if the server hangs up first */
  take(length: number): Promise<Buffer> {
    return this.#bytes.take(length);
  }

  async takeOptionReply(): Promise<{ type: number; data: Buffer }> {
    const header = await this.take(20);
    return { type: header.readUInt32BE(12), data: await this.take(header.readUInt32BE(16)) };
  }

  /** One chunk of a structured reply, header included. */
  async takeChunk(): Promise<Buffer> {
    const header = await this.take(20);
    return Buffer.concat([header, await this.take(header.readUInt32BE(16))]);
  }

  /** Waits until the server hangs up. */
  async hungUp(): Promise<void> {
    if (!this.socket.closed) await once(this.socket, "close");
  }

  [Symbol.dispose](): void {
    this.socket.destroy();
  }
}
