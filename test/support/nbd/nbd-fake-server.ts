// SPDX-License-Identifier: AGPL-3.0-or-later
// An NBD server that does what its script says, including what no server should do.
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { NbdAddress } from "../../../src/nbd/address.ts";
import {
  blockSizeInfo,
  contextReply,
  exportInfo,
  greeting,
  OPT_GO,
  OPT_SET_META_CONTEXT,
  OPT_STRUCTURED_REPLY,
  optionReply,
  REP_ACK,
  REP_ERR_UNSUP,
} from "./nbd-bytes.ts";
import { HungUpError, SocketBytes } from "./socket-bytes.ts";

export interface FakeRequest {
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  readonly offset: number;
  readonly length: number;
}

export interface HandshakeScript {
  readonly sizeBytes?: number | bigint;
  /** Transmission flags; 0x01 has flags, 0x04 flush, 0x20 trim, 0x40 write zeroes. */
  readonly flags?: number;
  readonly structured?: boolean;
  /** Contexts to grant: name to id. */
  readonly contexts?: Readonly<Record<string, number>>;
  readonly blockSize?: readonly [number, number, number];
}

/** Transmission flags of a server that offers flush, trim and write zeroes. */
export const ALL_FLAGS = 0x01 | 0x04 | 0x20 | 0x40;

/** The server's end of one connection. */
export class FakePeer {
  readonly socket: Socket;
  readonly #bytes: SocketBytes;

  constructor(socket: Socket) {
    this.socket = socket;
    this.#bytes = new SocketBytes(socket);
  }

  /** @throws HungUpError if the client hangs up first */
  async take(length: number): Promise<Buffer> {
    return await this.#bytes.take(length);
  }

  send(...parts: Buffer[]): void {
    this.socket.write(Buffer.concat(parts));
  }

  /** Sends every byte as a separate packet. */
  async sendSlowly(data: Buffer): Promise<void> {
    for (const byte of data) {
      this.socket.write(Buffer.of(byte));
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  /** Reads one option; returns its number and data. */
  async takeOption(): Promise<{ option: number; data: Buffer }> {
    const header = await this.take(16);
    return { option: header.readUInt32BE(8), data: await this.take(header.readUInt32BE(12)) };
  }

  async takeRequest(): Promise<FakeRequest> {
    const header = await this.take(28);
    return {
      flags: header.readUInt16BE(4),
      type: header.readUInt16BE(6),
      cookie: header.readBigUInt64BE(8),
      offset: Number(header.readBigUInt64BE(16)),
      length: header.readUInt32BE(24),
    };
  }

  /** An honest handshake up to the transmission phase. */
  async handshake(script: HandshakeScript = {}): Promise<void> {
    const { sizeBytes = 1 << 20, flags = ALL_FLAGS, structured = true, contexts = {}, blockSize } = script;
    this.send(greeting());
    await this.take(4);
    for (;;) {
      const { option } = await this.takeOption();
      if (option === OPT_STRUCTURED_REPLY) {
        this.send(optionReply(option, structured ? REP_ACK : REP_ERR_UNSUP));
      } else if (option === OPT_SET_META_CONTEXT) {
        for (const [name, id] of Object.entries(contexts)) this.send(contextReply(option, id, name));
        this.send(optionReply(option, REP_ACK));
      } else if (option === OPT_GO) {
        this.send(exportInfo(sizeBytes, flags));
        if (blockSize !== undefined) this.send(blockSizeInfo(...blockSize));
        this.send(optionReply(option, REP_ACK));
        return;
      } else {
        this.send(optionReply(option, REP_ERR_UNSUP));
      }
    }
  }
}

export interface FakeServer extends AsyncDisposable {
  readonly address: NbdAddress;
  /** Connections that are open now. */
  readonly connections: ReadonlySet<Socket>;
}

/** Listens on its own unix socket; every connection runs `script`, then stays open. */
export async function startFakeServer(script: (peer: FakePeer) => Promise<void>): Promise<FakeServer> {
  const folder = await mkdtemp(join(tmpdir(), "nbd-fake-"));
  const path = join(folder, "s.sock");
  const connections = new Set<Socket>();
  const server = createServer((socket) => {
    connections.add(socket);
    socket.on("close", () => connections.delete(socket));
    // Many scripts make the client hang up early.
    script(new FakePeer(socket)).catch((error: unknown) => {
      if (!(error instanceof HungUpError)) socket.destroy(error as Error);
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  return {
    address: { transport: "unix", path },
    connections,
    async [Symbol.asyncDispose]() {
      for (const socket of connections) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
      await rm(folder, { recursive: true, force: true });
    },
  };
}
