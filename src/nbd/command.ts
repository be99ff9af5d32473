// SPDX-License-Identifier: AGPL-3.0-or-later
// A command that waits for its reply, and the table of them. No I/O.

import { CommandType, errnoName, MAX_QUOTED_TEXT } from "./constants.ts";
import { Coverage } from "./coverage.ts";
import { NbdProtocolError, NbdServerError } from "./errors.ts";
import type { BlockStatusExtent, NbdRequest } from "./wire.ts";

const COMMAND_WORDS: Readonly<Record<number, string>> = {
  [CommandType.Read]: "read",
  [CommandType.Write]: "write",
  [CommandType.Flush]: "flush",
  [CommandType.Trim]: "trim",
  [CommandType.WriteZeroes]: "zero",
  [CommandType.BlockStatus]: "query the block status of",
};

/** One command in flight. The first error wins; it is reported when the last chunk has arrived. */
export class PendingCommand {
  readonly request: NbdRequest;
  /** Where the payload of a READ goes; borrowed until `done` settles. */
  readonly target: Buffer | undefined;
  /** Whether one of the caller's buffers is in use, for reading into or writing from. */
  readonly isBorrowing: boolean;
  readonly coverage = new Coverage();
  /** Answers to a BLOCK_STATUS, by context id. */
  readonly statuses = new Map<number, readonly BlockStatusExtent[]>();
  readonly done: Promise<void>;
  readonly #resolve: () => void;
  readonly #reject: (error: unknown) => void;
  #error: NbdServerError | NbdProtocolError | undefined;

  constructor(request: NbdRequest, isBorrowing: boolean, target?: Buffer) {
    this.request = request;
    this.isBorrowing = isBorrowing;
    this.target = target;
    let resolveDone: () => void = () => undefined;
    let rejectDone: (error: unknown) => void = () => undefined;
    this.done = new Promise((resolve, reject) => {
      resolveDone = resolve;
      rejectDone = reject;
    });
    this.#resolve = resolveDone;
    this.#reject = rejectDone;
  }

  /** `read 65536 bytes at 0`, for messages. */
  get description(): string {
    const { type, offset, length } = this.request;
    const word = COMMAND_WORDS[type] ?? `run command ${type} on`;
    return type === CommandType.Flush ? word : `${word} ${length} bytes at ${offset}`;
  }

  /** Records that the server refused; the command fails with the first refusal. */
  noteServerError(error: number, text: string, offset: number | undefined): void {
    const errno = errnoName(error);
    const place = offset === undefined ? "" : ` at offset ${offset}`;
    const quoted = text === "" ? "" : `: ${text.slice(0, MAX_QUOTED_TEXT)}`;
    this.#error ??= new NbdServerError(`Cannot ${this.description}: the NBD server answers ${errno}${place}${quoted}`, {
      errno,
    });
  }

  /** Records a reply that is malformed, but whose frame is intact. */
  noteProtocolError(state: string): void {
    this.#error ??= new NbdProtocolError(`Cannot ${this.description}: ${state}`);
  }

  /** The last chunk has arrived: settles with success or the first error recorded. */
  finish(): void {
    if (this.#error === undefined) this.#resolve();
    else this.#reject(this.#error);
  }

  /** Settles at once: the connection is dead, or the caller no longer waits. */
  abandon(error: unknown): void {
    this.#reject(error);
  }
}

/** The commands in flight, by cookie. */
export class CommandTable {
  readonly #commands = new Map<bigint, PendingCommand>();

  get size(): number {
    return this.#commands.size;
  }

  add(command: PendingCommand): void {
    this.#commands.set(command.request.cookie, command);
  }

  /** @throws NbdProtocolError for a cookie that no command in flight has */
  get(cookie: bigint): PendingCommand {
    const command = this.#commands.get(cookie);
    if (command === undefined) {
      throw new NbdProtocolError(`Cannot match NBD reply: no command in flight has the cookie ${cookie}`);
    }
    return command;
  }

  finish(command: PendingCommand): void {
    this.#commands.delete(command.request.cookie);
    command.finish();
  }

  /** The connection is dead: every command in flight fails with the same error. */
  abandonAll(error: unknown): void {
    const commands = [...this.#commands.values()];
    this.#commands.clear();
    for (const command of commands) command.abandon(error);
  }
}
