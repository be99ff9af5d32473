// SPDX-License-Identifier: AGPL-3.0-or-later
// The conversation between the two processes of a container backup: the host's (root, owns the store) and the one
// inside the container's user namespace (writes the archive). One JSON object per line over a Unix socket.
import { randomBytes, timingSafeEqual } from "node:crypto";
import { rm } from "node:fs/promises";
import { createServer, type Server, Socket } from "node:net";
import path from "node:path";
import { CancelledError, environmentError, HostError, messageOf } from "../../core/index.ts";
import { sweepRawViews, ViewFolder } from "../../device/index.ts";

/** The largest message holds a guest config of 4 MiB in base64. */
const MAX_LINE_BYTES = 8 * 1024 * 1024;
const TOKEN_BYTES = 32;

export type HandoffMessage = Readonly<Record<string, unknown>>;

/** The other side sent something that makes no sense. */
export class HandoffError extends HostError {
  override readonly code = "CHILD_PROCESS";
}

/** One end of the connection. */
export class HandoffChannel implements Disposable {
  readonly #socket: Socket;
  readonly #messages: AsyncGenerator<HandoffMessage, void, undefined>;

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on("error", () => undefined); // the reader sees it as the end
    this.#messages = readMessages(socket);
  }

  /** Takes over a connected socket that this process inherited. */
  static inherit(fd: number): HandoffChannel {
    try {
      return new HandoffChannel(new Socket({ fd, readable: true, writable: true }));
    } catch (cause) {
      throw new HandoffError(`Cannot use the inherited handle ${fd}: it is not a socket`, { cause });
    }
  }

  /** Never fails: a message that cannot be delivered is lost, and the reader learns why. */
  send(message: HandoffMessage): void {
    if (this.#socket.writable) this.#socket.write(`${JSON.stringify(message)}\n`);
  }

  /**
   * The next message; undefined when the other side is gone.
   *
   * @throws HandoffError if it sent something else
   */
  async next(): Promise<HandoffMessage | undefined> {
    const { done, value } = await this.#messages.next();
    return done === true ? undefined : value;
  }

  /** Closes as soon as everything sent has left, whether the other side reads or not; next() then sees the end. */
  end(): void {
    this.#socket.end(() => this.#socket.destroy());
  }

  [Symbol.dispose](): void {
    this.#socket.destroy();
  }
}

async function* readMessages(socket: Socket): AsyncGenerator<HandoffMessage, void, undefined> {
  let rest = Buffer.alloc(0);
  try {
    for await (const chunk of socket) {
      rest = Buffer.concat([rest, chunk as Buffer]);
      for (let end = rest.indexOf(0x0a); end >= 0; end = rest.indexOf(0x0a)) {
        const line = rest.subarray(0, end).toString("utf8");
        rest = rest.subarray(end + 1);
        yield parseMessage(line);
      }
      if (rest.length > MAX_LINE_BYTES) {
        throw new HandoffError(
          `Cannot read the other process of the backup: a message has more than ${MAX_LINE_BYTES} bytes`,
        );
      }
    }
  } catch (error) {
    if (error instanceof HostError) throw error;
    // A reset, or our own dispose: nothing more will come.
  }
}

function parseMessage(line: string): HandoffMessage {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch (cause) {
    throw new HandoffError("Cannot read the other process of the backup: it did not send JSON", { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new HandoffError("Cannot read the other process of the backup: it did not send an object");
  }
  return value as HandoffMessage;
}

/** Waits for exactly one connection, which must begin with the token; nothing is left of the socket then. */
export class HandoffListener implements AsyncDisposable {
  readonly path: string;
  readonly token: string;
  readonly #server: Server;
  readonly #folder: ViewFolder;
  readonly #connected: Promise<Socket>;

  private constructor(server: Server, folder: ViewFolder, socketPath: string) {
    this.#server = server;
    this.#folder = folder;
    this.path = socketPath;
    this.token = randomBytes(TOKEN_BYTES).toString("hex");
    this.#connected = new Promise((resolve, reject) => {
      server.once("connection", (socket) => {
        server.close(); // no second one
        resolve(socket);
      });
      server.once("close", () => reject(new CancelledError("Cancelled: no process took over the container's archive")));
    });
    this.#connected.catch(() => undefined); // accept() tells
  }

  /** What the connection must begin with. */
  get firstLine(): string {
    return JSON.stringify({ token: this.token });
  }

  /**
   * @param runDir directory accessible to root only, on a local file system; created if missing
   * @param warn called with what killed processes left in it that cannot be removed; it does no harm
   * @throws EnvironmentError
   */
  static async open(runDir: string, warn: (message: string) => void): Promise<HandoffListener> {
    await sweepRawViews(runDir, warn).catch((error: unknown) => warn(messageOf(error)));
    const folder = await ViewFolder.create(runDir, "handoff");
    const socketPath = path.join(folder.path, "sock");
    const server = createServer();
    try {
      await new Promise<void>((resolve, reject) => {
        server.once("error", reject);
        server.listen(socketPath, resolve);
      });
      return new HandoffListener(server, folder, socketPath);
    } catch (error) {
      await folder[Symbol.asyncDispose]().catch(() => undefined);
      throw environmentError("listen on", socketPath, error);
    }
  }

  /**
   * The one connection, once its token has proved right.
   *
   * @throws CancelledError if this was disposed meanwhile; HandoffError for a wrong token; the reason of `signal`
   */
  async accept(signal: AbortSignal): Promise<HandoffChannel> {
    const socket = await this.#connected;
    await this[Symbol.asyncDispose]();
    const channel = new HandoffChannel(socket);
    const onAbort = (): void => channel[Symbol.dispose]();
    signal.addEventListener("abort", onAbort, { once: true });
    if (signal.aborted) onAbort();
    const first = await channel.next().finally(() => signal.removeEventListener("abort", onAbort));
    if (!this.#isToken(first?.token)) {
      channel[Symbol.dispose]();
      signal.throwIfAborted();
      throw new HandoffError("Cannot hand the container's archive over: another process took the connection");
    }
    return channel;
  }

  #isToken(token: unknown): boolean {
    const ours = Buffer.from(this.token);
    const theirs = Buffer.from(typeof token === "string" ? token : "");
    return theirs.length === ours.length && timingSafeEqual(ours, theirs);
  }

  /**
   * Stops accepting; an existing connection stays. A directory that cannot be removed is left to a sweep: the
   * connection must still be answered, and the backup cleaned up.
   */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.close();
    await rm(this.path, { force: true }).catch(() => undefined);
    await this.#folder[Symbol.asyncDispose]().catch(() => undefined);
  }
}
