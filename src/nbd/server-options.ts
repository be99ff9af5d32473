// SPDX-License-Identifier: AGPL-3.0-or-later
// The handshake phase from the server's side: greeting, then one option after the other until the client chooses an
// export or leaves. A client that breaks the protocol gets no answer: undefined ends the connection.
// Source: NBD doc/proto.md, "Fixed newstyle negotiation" and "Option types".

import {
  BASE_ALLOCATION,
  HandshakeFlag,
  InfoType,
  MAX_OPTION_BYTES,
  MAX_PAYLOAD_BYTES,
  OptionReplyType,
  OptionType,
  TransmissionFlag,
} from "./constants.ts";
import {
  CLIENT_FLAGS_BYTES,
  decodeGoData,
  decodeMetaContextData,
  decodeOptionHeader,
  encodeBlockSize,
  encodeExportInfo,
  encodeGreeting,
  encodeMetaContext,
  encodeOptionReplyHeader,
  encodeServer,
  OPTION_HEADER_BYTES,
} from "./option-wire.ts";
import { type Receiver, receiveBytes, type Send } from "./receiver.ts";
import type { NbdExport } from "./server-export.ts";

/** The only metadata context of this server. */
export const ALLOCATION_CONTEXT_ID = 1;
/** Any byte range can be read; 64 KiB is what a cluster has. */
const BLOCK_SIZE = { minimum: 1, preferred: 64 * 1024, maximum: MAX_PAYLOAD_BYTES } as const;
/** What follows the answer to NBD_OPT_EXPORT_NAME unless both sides agreed to leave it out. */
const RESERVED_ZEROES = Buffer.alloc(124);
const SERVER_FLAGS = HandshakeFlag.FixedNewstyle | HandshakeFlag.NoZeroes;

interface FinalReply {
  readonly type: OptionReplyType;
  readonly data: Buffer;
}

/** The data of an error is a text for people. */
const refusal = (type: OptionReplyType, text: string): FinalReply => ({ type, data: Buffer.from(text) });

const ACK: FinalReply = { type: OptionReplyType.Ack, data: Buffer.alloc(0) };
const MALFORMED = refusal(OptionReplyType.ErrInvalid, "the data of the option is malformed");
const UNKNOWN_EXPORT = refusal(OptionReplyType.ErrUnknown, "there is no such export");
const NO_STRUCTURED_REPLIES = refusal(OptionReplyType.ErrInvalid, "structured replies were not negotiated");

/** What the client has chosen when the transmission phase begins. */
export interface ChosenExport {
  readonly export: NbdExport;
  readonly hasStructuredReplies: boolean;
  /** base:allocation was negotiated. */
  readonly hasAllocation: boolean;
}

/** From the greeting to the first moment of the transmission phase; undefined if the client does not get there. */
export function* serveHandshake(
  send: Send,
  exports: ReadonlyMap<string, NbdExport>,
): Receiver<ChosenExport | undefined> {
  send(encodeGreeting(SERVER_FLAGS));
  const flags = (yield* receiveBytes(CLIENT_FLAGS_BYTES)).readUInt32BE(0);
  if ((flags & ~SERVER_FLAGS) !== 0 || (flags & HandshakeFlag.FixedNewstyle) === 0) return undefined;
  const haggling = new Haggling(send, exports, (flags & HandshakeFlag.NoZeroes) !== 0);
  while (!haggling.isOver) {
    const header = decodeOptionHeader(yield* receiveBytes(OPTION_HEADER_BYTES));
    if (header === undefined || header.dataBytes > MAX_OPTION_BYTES) return undefined;
    haggling.answer(header.option, yield* receiveBytes(header.dataBytes));
  }
  return haggling.chosen;
}

class Haggling {
  readonly #send: Send;
  readonly #exports: ReadonlyMap<string, NbdExport>;
  readonly #hasNoZeroes: boolean;
  #hasStructuredReplies = false;
  /** The export for which base:allocation was set. */
  #contextExport: NbdExport | undefined;
  chosen: ChosenExport | undefined;
  isOver = false;

  constructor(send: Send, exports: ReadonlyMap<string, NbdExport>, hasNoZeroes: boolean) {
    this.#send = send;
    this.#exports = exports;
    this.#hasNoZeroes = hasNoZeroes;
  }

  answer(option: number, data: Buffer): void {
    const end = this.#run(option, data);
    if (end !== undefined) this.#reply(option, end.type, end.data);
    if (option === OptionType.Abort || option === OptionType.ExportName || this.chosen !== undefined)
      this.isOver = true;
  }

  /** Does what the option says and returns the reply that ends it; NBD_OPT_EXPORT_NAME has none. */
  #run(option: number, data: Buffer): FinalReply | undefined {
    switch (option) {
      case OptionType.ExportName:
        this.#openByName(data);
        return undefined;
      case OptionType.Abort:
        return ACK;
      case OptionType.List:
        return this.#list(data);
      case OptionType.Info:
      case OptionType.Go:
        return this.#describe(option, data);
      case OptionType.StructuredReply:
        if (data.length > 0) return MALFORMED;
        this.#hasStructuredReplies = true;
        return ACK;
      case OptionType.ListMetaContext:
      case OptionType.SetMetaContext:
        return this.#metaContexts(option, data);
      default:
        return refusal(OptionReplyType.ErrUnsup, "this server does not support the option");
    }
  }

  /** The only option that cannot be refused: the connection ends if there is no such export. */
  #openByName(data: Buffer): void {
    const found = this.#exports.get(data.toString());
    if (found === undefined) return;
    this.#send(this.#encodeInfo(found));
    if (!this.#hasNoZeroes) this.#send(RESERVED_ZEROES);
    this.#choose(found);
  }

  #list(data: Buffer): FinalReply {
    if (data.length > 0) return MALFORMED;
    for (const { name, description = "" } of this.#exports.values()) {
      this.#reply(OptionType.List, OptionReplyType.Server, encodeServer(name, description));
    }
    return ACK;
  }

  /** NBD_OPT_INFO and NBD_OPT_GO. */
  #describe(option: number, data: Buffer): FinalReply {
    const asked = decodeGoData(data);
    if (asked === undefined) return MALFORMED;
    const found = this.#exports.get(asked.exportName);
    if (found === undefined) return UNKNOWN_EXPORT;
    this.#info(option, InfoType.Export, this.#encodeInfo(found));
    if (asked.infoTypes.has(InfoType.Name)) this.#info(option, InfoType.Name, Buffer.from(found.name));
    if (asked.infoTypes.has(InfoType.Description) && found.description !== undefined) {
      this.#info(option, InfoType.Description, Buffer.from(found.description));
    }
    if (asked.infoTypes.has(InfoType.BlockSize)) this.#info(option, InfoType.BlockSize, encodeBlockSize(BLOCK_SIZE));
    if (option === OptionType.Go) this.#choose(found);
    return ACK;
  }

  /** LIST may name a whole namespace, or nothing, which means all; SET names each context in full. */
  #metaContexts(option: number, data: Buffer): FinalReply {
    const isSet = option === OptionType.SetMetaContext;
    if (isSet) this.#contextExport = undefined;
    const asked = decodeMetaContextData(data);
    if (asked === undefined) return MALFORMED;
    if (!this.#hasStructuredReplies) return NO_STRUCTURED_REPLIES;
    const found = this.#exports.get(asked.exportName);
    if (found === undefined) return UNKNOWN_EXPORT;
    const { queries } = asked;
    const isListed = !isSet && (queries.length === 0 || queries.includes("base:"));
    if (isListed || queries.includes(BASE_ALLOCATION)) {
      const id = isSet ? ALLOCATION_CONTEXT_ID : 0;
      this.#reply(option, OptionReplyType.MetaContext, encodeMetaContext(id, BASE_ALLOCATION));
      if (isSet) this.#contextExport = found;
    }
    return ACK;
  }

  #choose(found: NbdExport): void {
    this.chosen = {
      export: found,
      hasStructuredReplies: this.#hasStructuredReplies,
      hasAllocation: this.#contextExport === found,
    };
  }

  /** Clients may use several connections: the exports never change. */
  #encodeInfo({ sizeBytes }: NbdExport): Buffer {
    const flags = TransmissionFlag.HasFlags | TransmissionFlag.ReadOnly | TransmissionFlag.CanMultiConn;
    const transmissionFlags = this.#hasStructuredReplies ? flags | TransmissionFlag.SendDf : flags;
    return encodeExportInfo({ sizeBytes, transmissionFlags });
  }

  #info(option: number, type: number, body: Buffer): void {
    const head = Buffer.alloc(2);
    head.writeUInt16BE(type, 0);
    this.#reply(option, OptionReplyType.Info, Buffer.concat([head, body]));
  }

  #reply(option: number, type: OptionReplyType, data: Buffer): void {
    this.#send(Buffer.concat([encodeOptionReplyHeader({ option, type, dataBytes: data.length }), data]));
  }
}
