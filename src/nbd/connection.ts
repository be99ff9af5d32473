// SPDX-License-Identifier: AGPL-3.0-or-later
// The client: one connection to one export, many commands in flight.

import { alignDown, alignUp, RequestError, UnsupportedError } from "../core/index.ts";
import { AbortGroups } from "./abort-groups.ts";
import { checkName, describeAddress, type NbdAddress } from "./address.ts";
import type { NbdChannel } from "./channel.ts";
import { CommandTable, PendingCommand } from "./command.ts";
import { CommandType, MAX_RANGE_BYTES, TransmissionFlag } from "./constants.ts";
import { NbdConnectionError } from "./errors.ts";
import { type Negotiated, negotiate } from "./handshake.ts";
import { IdleWatch } from "./idle-watch.ts";
import type { BlockSize } from "./option-wire.ts";
import { allSettled, checkRange, clip, cut } from "./ranges.ts";
import { receiveReplies } from "./replies.ts";
import { openSession } from "./session.ts";
import { type BlockStatusExtent, encodeRequest, type NbdRequest } from "./wire.ts";

const DEFAULT_REPLY_TIMEOUT_MS = 120_000;

export interface NbdOpenOptions {
  readonly address: NbdAddress;
  readonly exportName: string;
  /** Full names of the metadata contexts to ask for; see `metaContexts` for those granted. */
  readonly metaContexts?: readonly string[];
  /** Time limit for connect and handshake together; 30 s if absent. */
  readonly connectTimeoutMs?: number;
  /** How long commands may wait without a single byte from the server; 120 s if absent. */
  readonly replyTimeoutMs?: number;
  /** Aborts the opening. Each command has its own signal. */
  readonly signal: AbortSignal;
}

/**
 * Offsets and lengths are bytes and must lie inside the export and on its `blockSize.minimum`
 * (the end of the export counts as aligned). Requests beyond the server's maximum are split.
 *
 * Every command throws: RequestError for a wrong range; UnsupportedError for what the server does
 * not offer; NbdServerError if the server refuses; NbdProtocolError and NbdConnectionError if the
 * connection died, and then all commands fail with the same error; the reason of its signal.
 * Aborting a read or a write in flight closes the connection: there is no other way to free the
 * caller's buffer at once. Aborting any other command leaves the connection usable.
 */
export class NbdConnection implements AsyncDisposable {
  readonly sizeBytes: number;
  readonly isReadOnly: boolean;
  readonly canTrim: boolean;
  readonly canWriteZeroes: boolean;
  readonly canFlush: boolean;
  readonly canMultiConn: boolean;
  /** In bytes; the protocol's defaults if the server says nothing. */
  readonly blockSize: BlockSize;
  /** Names of the metadata contexts the server accepted. */
  readonly metaContexts: readonly string[];
  readonly #address: NbdAddress;
  readonly #channel: NbdChannel;
  readonly #commands: CommandTable;
  readonly #contexts: ReadonlyMap<number, string>;
  readonly #watch: IdleWatch;
  readonly #aborts = new AbortGroups<PendingCommand>((commands, reason) => this.#abort(commands, reason));
  #nextCookie = 1n;

  private constructor(channel: NbdChannel, commands: CommandTable, negotiated: Negotiated, options: NbdOpenOptions) {
    const flags = negotiated.transmissionFlags;
    this.sizeBytes = negotiated.sizeBytes;
    this.isReadOnly = (flags & TransmissionFlag.ReadOnly) !== 0;
    this.canTrim = (flags & TransmissionFlag.SendTrim) !== 0;
    this.canWriteZeroes = (flags & TransmissionFlag.SendWriteZeroes) !== 0;
    this.canFlush = (flags & TransmissionFlag.SendFlush) !== 0;
    this.canMultiConn = (flags & TransmissionFlag.CanMultiConn) !== 0;
    this.blockSize = negotiated.blockSize;
    this.metaContexts = [...negotiated.contexts.values()];
    this.#address = options.address;
    this.#channel = channel;
    this.#commands = commands;
    this.#contexts = negotiated.contexts;
    const timeoutMs = options.replyTimeoutMs ?? DEFAULT_REPLY_TIMEOUT_MS;
    this.#watch = new IdleWatch({
      timeoutMs,
      lastByteMs: () => channel.lastByteMs,
      isWaiting: () => commands.size > 0,
      onIdle: () => channel.fail(this.#hangs(timeoutMs)),
    });
  }

  /**
   * Connects and negotiates: structured replies if offered, the metadata contexts, the export.
   *
   * @throws NbdConnectionError, NbdProtocolError; NbdServerError if the export is refused;
   *   UnsupportedError for a server without fixed newstyle; RequestError for an impossible name
   */
  static async open(options: NbdOpenOptions): Promise<NbdConnection> {
    const { exportName, metaContexts = [] } = options;
    checkName("export name", exportName);
    for (const name of metaContexts) checkName("metadata context", name);
    const commands = new CommandTable();
    const { channel, result } = await openSession<Negotiated>(options, {
      handshake: (send) => negotiate(send, exportName, [...new Set(metaContexts)]),
      transmission: (negotiated) => receiveReplies({ ...negotiated, commands }),
      onFailure: (error) => commands.abandonAll(error),
    });
    return new NbdConnection(channel, commands, result, options);
  }

  /** Fills `target` completely, or throws. `target` is borrowed until the promise settles, no longer. */
  async read(offset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    checkRange("read", { offset, length: target.length }, this);
    await allSettled(
      cut(offset, target.length, this.blockSize.maximum).map((part) => {
        const into = target.subarray(part.offset - offset, part.offset - offset + part.length);
        return this.#run(CommandType.Read, part.offset, part.length, signal, { target: into });
      }),
    );
  }

  /** Writes `bytes`, which are borrowed until the promise settles. */
  async write(offset: number, bytes: Uint8Array, signal: AbortSignal): Promise<void> {
    this.#checkWritable("write", true);
    checkRange("write", { offset, length: bytes.length }, this);
    await allSettled(
      cut(offset, bytes.length, this.blockSize.maximum).map((part) => {
        const payload = bytes.subarray(part.offset - offset, part.offset - offset + part.length);
        return this.#run(CommandType.Write, part.offset, part.length, signal, { payload });
      }),
    );
  }

  /** Tells the server that the range is no longer needed; it may ignore that. */
  async trim(offset: number, length: number, signal: AbortSignal): Promise<void> {
    this.#checkWritable("trim", this.canTrim);
    await this.#runRange("trim", CommandType.Trim, offset, length, signal);
  }

  /** Makes the range read as zeroes. */
  async writeZeroes(offset: number, length: number, signal: AbortSignal): Promise<void> {
    this.#checkWritable("write zeroes", this.canWriteZeroes);
    await this.#runRange("write zeroes", CommandType.WriteZeroes, offset, length, signal);
  }

  /** Returns when all writes that were answered before are on stable storage. */
  async flush(signal: AbortSignal): Promise<void> {
    this.#checkWritable("flush", this.canFlush);
    await this.#run(CommandType.Flush, 0, 0, signal);
  }

  /**
   * What the server knows about the range: one list for each negotiated metadata context, by its name.
   * Each list starts at `offset`, is ascending, contiguous and clipped to the request, and neighbours
   * differ in their flags. It covers at least one block and perhaps only a prefix, which can differ
   * between the lists: ask again from its end. A request covers at most 1 GiB.
   */
  async blockStatus(
    offset: number,
    length: number,
    signal: AbortSignal,
  ): Promise<ReadonlyMap<string, readonly BlockStatusExtent[]>> {
    if (this.#contexts.size === 0) {
      throw new UnsupportedError("Cannot query block status: no metadata context was negotiated");
    }
    checkRange("query block status of", { offset, length }, { sizeBytes: this.sizeBytes });
    if (length === 0) throw new RequestError(`Cannot query block status of 0 bytes at ${offset}: at least 1 is needed`);
    const start = alignDown(offset, this.blockSize.minimum);
    const end = Math.min(alignUp(offset + length, this.blockSize.minimum), start + MAX_RANGE_BYTES, this.sizeBytes);
    const command = await this.#run(CommandType.BlockStatus, start, end - start, signal);
    const lists = new Map<string, readonly BlockStatusExtent[]>();
    for (const [id, name] of this.#contexts) {
      lists.set(name, clip(command.statuses.get(id) ?? [], offset, offset + length));
    }
    return lists;
  }

  /** Ends the connection: politely if nothing is pending; otherwise at once, and pending commands fail. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#commands.size > 0) this.#channel.fail(this.#closedHere());
    this.#watch.disarm();
    await this.#channel.close(
      encodeRequest({ type: CommandType.Disc, flags: 0, cookie: this.#nextCookie, offset: 0, length: 0 }),
    );
  }

  async #runRange(act: string, type: CommandType, offset: number, length: number, signal: AbortSignal): Promise<void> {
    checkRange(act, { offset, length }, this);
    for (const part of cut(offset, length, MAX_RANGE_BYTES)) await this.#run(type, part.offset, part.length, signal);
  }

  /** Sends one request and waits for the end of its reply. */
  async #run(
    type: CommandType,
    offset: number,
    length: number,
    signal: AbortSignal,
    data: { readonly target?: Buffer; readonly payload?: Uint8Array } = {},
  ): Promise<PendingCommand> {
    signal.throwIfAborted();
    if (this.#channel.isClosing) throw this.#closedHere();
    if (this.#channel.failure !== undefined) throw this.#channel.failure.error;
    const request: NbdRequest = { type, flags: 0, cookie: this.#nextCookie++, offset, length };
    const isBorrowing = data.target !== undefined || data.payload !== undefined;
    const command = new PendingCommand(request, isBorrowing, data.target);
    if (this.#commands.size === 0) this.#watch.arm();
    this.#commands.add(command);
    this.#channel.send(encodeRequest(request), data.payload);
    this.#aborts.add(signal, command);
    try {
      await command.done;
      return command;
    } finally {
      this.#aborts.remove(signal, command);
    }
  }

  #abort(commands: readonly PendingCommand[], reason: unknown): void {
    for (const command of commands) command.abandon(reason);
    if (commands.some((command) => command.isBorrowing)) this.#channel.fail(this.#cancelled(reason));
  }

  #checkWritable(act: string, isOffered: boolean): void {
    if (this.isReadOnly && act !== "flush") throw new UnsupportedError(`Cannot ${act}: the NBD export is read-only`);
    if (!isOffered) throw new UnsupportedError(`Cannot ${act}: the NBD server does not offer it for this export`);
  }

  #closedHere(): NbdConnectionError {
    return new NbdConnectionError(`Cannot use NBD connection to ${this.#name}: it was closed here`);
  }

  #hangs(timeoutMs: number): NbdConnectionError {
    return new NbdConnectionError(
      `NBD server at ${this.#name} did not answer for ${timeoutMs / 1000} s (commands waiting: ${this.#commands.size})`,
      { errno: "ETIMEDOUT" },
    );
  }

  #cancelled(reason: unknown): NbdConnectionError {
    return new NbdConnectionError(
      `Cannot use NBD connection to ${this.#name}: it was closed because a transfer was cancelled`,
      { cause: reason },
    );
  }

  get #name(): string {
    return JSON.stringify(describeAddress(this.#address));
  }
}
