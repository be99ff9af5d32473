// SPDX-License-Identifier: AGPL-3.0-or-later
// The server: a unix socket of which several clients read the same disks.
//
// The socket appears under its name with mode 0600 already. bind() makes it with the process's umask, which belongs
// to the whole process and is not ours to change, and a chmod after bind() comes late. So it is made in a directory that
// only we can enter, gets its mode there, and is linked to its name; link() also refuses a name that is taken.

import { chmod, link, mkdtemp, rm } from "node:fs/promises";
import { createServer, type Server } from "node:net";
import path from "node:path";
import { environmentError, MIB, RequestError } from "../core/index.ts";
import { checkName } from "./address.ts";
import { RESERVE_BYTES, ServerBuffers } from "./server-buffers.ts";
import { type NbdReadPlace, ServerConnection, type ServerContext } from "./server-connection.ts";
import { EXPORT_BLOCK_BYTES, type NbdExport } from "./server-export.ts";

/** sun_path without its NUL. */
const MAX_SOCKET_PATH_BYTES = 107;

export interface NbdServerLimits {
  /** Clients at once; more are hung up on. 16 if absent. */
  readonly connections?: number;
  /** Memory for replies; 64 MiB if absent. At least 2 MiB and 1 KiB for each connection. */
  readonly bufferBytes?: number;
  /** Requests in flight of one client; 128 if absent. */
  readonly requestsPerConnection?: number;
  /** Time for the handshake of one client; 30 s if absent. */
  readonly handshakeTimeoutMs?: number;
}

interface NbdServerOptions {
  /** Of the socket; it must not exist. Its directory decides who else can replace it. */
  readonly path: string;
  /** With different names. */
  readonly exports: readonly NbdExport[];
  /** Called once for each request that failed because read() or extents() did, with the range that was asked. */
  readonly onError: (error: unknown, where: NbdReadPlace) => void;
  readonly limits?: NbdServerLimits;
}

/** Serves its exports, read-only, until it is disposed. */
export class NbdServer implements AsyncDisposable {
  readonly path: string;
  readonly #server: Server;
  readonly #context: ServerContext;
  readonly #connections = new Set<ServerConnection>();
  #ending: Promise<void> | undefined;

  private constructor(options: NbdServerOptions) {
    const { connections = 16, bufferBytes = 64 * MIB, requestsPerConnection = 128 } = options.limits ?? {};
    if (bufferBytes < connections * RESERVE_BYTES) {
      throw new RequestError(
        `Cannot use NBD server limits: ${bufferBytes} bytes are too few for ${connections} connections of ${RESERVE_BYTES} bytes`,
      );
    }
    this.path = options.path;
    this.#context = {
      exports: byName(options.exports),
      buffers: new ServerBuffers(bufferBytes, connections),
      requestsPerConnection,
      handshakeTimeoutMs: options.limits?.handshakeTimeoutMs ?? 30_000,
      onError: options.onError,
    };
    this.#server = createServer((socket) => this.#welcome(new ServerConnection(socket, this.#context)));
    this.#server.maxConnections = connections;
  }

  /**
   * Listens; when the promise resolves, clients can connect.
   *
   * @throws RequestError for exports or limits that cannot be served; EnvironmentError if there is something at the
   *   path, or its directory cannot be written
   */
  static async listen(options: NbdServerOptions): Promise<NbdServer> {
    const server = new NbdServer(options);
    try {
      await server.#listen();
    } catch (error) {
      server.#server.close();
      throw environmentError("listen on NBD socket", options.path, error);
    }
    return server;
  }

  /**
   * Hangs up on all clients, aborts what they asked for, waits until that has settled, and removes the socket.
   * Idempotent.
   */
  [Symbol.asyncDispose](): Promise<void> {
    this.#ending ??= this.#end();
    return this.#ending;
  }

  async #listen(): Promise<void> {
    const nursery = await mkdtemp(path.join(path.dirname(this.path), ".nbd-"));
    try {
      const born = path.join(nursery, "s");
      if (Math.max(Buffer.byteLength(born), Buffer.byteLength(this.path)) > MAX_SOCKET_PATH_BYTES) {
        throw new RequestError(`Cannot use NBD socket "${this.path}": its path is too long for a socket`);
      }
      await new Promise<void>((resolve, reject) => {
        this.#server.once("error", reject);
        this.#server.listen(born, resolve);
      });
      // A client that could not be accepted has been hung up on, and that is all there is to say.
      this.#server.on("error", () => undefined);
      await chmod(born, 0o600);
      await link(born, this.path);
    } finally {
      await rm(nursery, { recursive: true, force: true });
    }
  }

  #welcome(connection: ServerConnection): void {
    this.#connections.add(connection);
    void connection.ended.then(() => {
      this.#connections.delete(connection);
      if (this.#connections.size === 0) this.#context.buffers.dropSpare();
    });
  }

  async #end(): Promise<void> {
    const closed = new Promise((resolve) => this.#server.close(resolve));
    for (const connection of this.#connections) connection.end();
    await rm(this.path, { force: true });
    await Promise.all([...this.#connections].map(({ ended }) => ended));
    await closed;
  }
}

/** @throws RequestError for a name or a size that cannot be served */
function byName(exports: readonly NbdExport[]): Map<string, NbdExport> {
  const map = new Map<string, NbdExport>();
  for (const one of exports) {
    const name = JSON.stringify(one.name);
    checkName("export name", one.name);
    checkName("export description", one.description ?? "");
    if (map.has(one.name)) throw new RequestError(`Cannot use NBD export ${name}: there are two of this name`);
    if (!Number.isSafeInteger(one.sizeBytes) || one.sizeBytes < 0 || one.sizeBytes % EXPORT_BLOCK_BYTES !== 0) {
      throw new RequestError(
        `Cannot use NBD export ${name}: its size ${one.sizeBytes} is not a multiple of ${EXPORT_BLOCK_BYTES} bytes`,
      );
    }
    map.set(one.name, one);
  }
  return map;
}
