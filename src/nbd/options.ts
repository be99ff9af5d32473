// SPDX-License-Identifier: AGPL-3.0-or-later
// Option haggling: one function per option; each sends its request and reads replies to the end.
// Source: NBD doc/proto.md, "Option types".

import {
  DEFAULT_BLOCK_SIZE,
  InfoType,
  isErrorOptionReply,
  MAX_OPTION_REPLIES,
  MAX_OPTION_REPLY_BYTES,
  MAX_QUOTED_TEXT,
  OptionReplyType,
  OptionType,
} from "./constants.ts";
import { NbdProtocolError, NbdServerError } from "./errors.ts";
import {
  type BlockSize,
  decodeBlockSize,
  decodeExportInfo,
  decodeMetaContext,
  decodeOptionReplyHeader,
  EXPORT_INFO_BYTES,
  type ExportInfo,
  encodeGoData,
  encodeMetaContextData,
  encodeOption,
  OPTION_REPLY_HEADER_BYTES,
} from "./option-wire.ts";
import { type Receiver, receiveBytes, type Send, skipBytes } from "./receiver.ts";

const NO_DATA = Buffer.alloc(0);

const ERROR_WORDS: Readonly<Record<number, readonly [name: string, meaning: string]>> = {
  [OptionReplyType.ErrUnsup]: ["NBD_REP_ERR_UNSUP", "the server does not support it"],
  [OptionReplyType.ErrPolicy]: ["NBD_REP_ERR_POLICY", "the server's policy forbids it"],
  [OptionReplyType.ErrInvalid]: ["NBD_REP_ERR_INVALID", "the server calls it invalid"],
  [OptionReplyType.ErrPlatform]: ["NBD_REP_ERR_PLATFORM", "the server's platform does not support it"],
  [OptionReplyType.ErrTlsReqd]: ["NBD_REP_ERR_TLS_REQD", "the server requires TLS, which is not supported"],
  [OptionReplyType.ErrUnknown]: ["NBD_REP_ERR_UNKNOWN", "the server has no such export"],
  [OptionReplyType.ErrShutdown]: ["NBD_REP_ERR_SHUTDOWN", "the server is shutting down"],
  [OptionReplyType.ErrBlockSizeReqd]: ["NBD_REP_ERR_BLOCK_SIZE_REQD", "the server wants block sizes negotiated"],
  [OptionReplyType.ErrTooBig]: ["NBD_REP_ERR_TOO_BIG", "the server calls the request too big"],
};

/** The error that ends an option: returned as a value, because some options have a fallback. */
interface Refusal {
  readonly type: number;
  readonly text: string;
}

interface OptionReply {
  readonly type: number;
  readonly data: Buffer;
}

/** Sends one option and passes each informational reply to `take`; returns undefined for ACK. */
function* runOption(
  send: Send,
  option: OptionType,
  data: Buffer,
  take: (reply: OptionReply) => void,
): Receiver<Refusal | undefined> {
  send(encodeOption(option, data));
  for (let replies = 0; replies <= MAX_OPTION_REPLIES; replies++) {
    const header = decodeOptionReplyHeader(yield* receiveBytes(OPTION_REPLY_HEADER_BYTES));
    if (header.option !== option) {
      throw new NbdProtocolError(
        `Cannot read NBD option reply: it answers option ${header.option}, ${option} was sent`,
      );
    }
    if (header.dataBytes > MAX_OPTION_REPLY_BYTES) {
      throw new NbdProtocolError(
        `Cannot read NBD option reply: it has ${header.dataBytes} bytes, at most ${MAX_OPTION_REPLY_BYTES} are allowed`,
      );
    }
    const reply = yield* receiveBytes(header.dataBytes);
    if (isErrorOptionReply(header.type)) {
      return { type: header.type, text: reply.toString("utf8", 0, Math.min(reply.length, MAX_QUOTED_TEXT)) };
    }
    if (header.type === OptionReplyType.Ack) return undefined;
    take({ type: header.type, data: reply });
  }
  throw new NbdProtocolError(`Cannot read NBD option reply: more than ${MAX_OPTION_REPLIES} replies to one option`);
}

/** NBD_OPT_STRUCTURED_REPLY; false if the server does not have it, for whatever reason. */
export function* requestStructuredReplies(send: Send): Receiver<boolean> {
  return (yield* runOption(send, OptionType.StructuredReply, NO_DATA, rejectReply)) === undefined;
}

/**
 * NBD_OPT_SET_META_CONTEXT; returns those of `names` that the server accepted, id to name. A server
 * that refuses the option as such has none; NBD_OPT_GO will tell whether the export exists.
 */
export function* setMetaContexts(
  send: Send,
  exportName: string,
  names: readonly string[],
): Receiver<Map<number, string>> {
  const contexts = new Map<number, string>();
  const missing = new Set(names);
  const data = encodeMetaContextData(exportName, names);
  const refusal = yield* runOption(send, OptionType.SetMetaContext, data, (reply) => {
    if (reply.type !== OptionReplyType.MetaContext) rejectReply(reply);
    const { id, name } = decodeMetaContext(reply.data);
    if (!missing.delete(name) || contexts.has(id)) {
      throw new NbdProtocolError(
        `Cannot negotiate NBD metadata contexts: the server selects ${JSON.stringify(name)} (id ${id}), which was not requested or is listed twice`,
      );
    }
    contexts.set(id, name);
  });
  if (refusal !== undefined) contexts.clear();
  return contexts;
}

export interface OpenedExport extends ExportInfo {
  readonly blockSize: BlockSize;
}

/**
 * NBD_OPT_GO, asking for block sizes; a server without it gets NBD_OPT_EXPORT_NAME, which cannot
 * report errors: the server just hangs up.
 *
 * @param hasNoZeroes both sides agreed to omit the 124 zero bytes of NBD_OPT_EXPORT_NAME
 * @throws NbdServerError if the server refuses the export
 */
export function* go(send: Send, exportName: string, hasNoZeroes: boolean): Receiver<OpenedExport> {
  let info: ExportInfo | undefined;
  let blockSize: BlockSize | undefined;
  const refusal = yield* runOption(send, OptionType.Go, encodeGoData(exportName, [InfoType.BlockSize]), (reply) => {
    if (reply.type !== OptionReplyType.Info) rejectReply(reply);
    if (reply.data.length < 2) throw new NbdProtocolError("Cannot read NBD information: it has no type");
    const type = reply.data.readUInt16BE(0);
    if (type === InfoType.Export) info = decodeExportInfo(reply.data.subarray(2));
    if (type === InfoType.BlockSize) blockSize = decodeBlockSize(reply.data.subarray(2));
  });
  if (refusal?.type === OptionReplyType.ErrUnsup) return yield* goByExportName(send, exportName, hasNoZeroes);
  if (refusal !== undefined) throw refused(`open NBD export ${JSON.stringify(exportName)}`, refusal);
  if (info === undefined) {
    throw new NbdProtocolError(`Cannot open NBD export ${JSON.stringify(exportName)}: the server did not say its size`);
  }
  return { ...info, blockSize: blockSize ?? DEFAULT_BLOCK_SIZE };
}

function* goByExportName(send: Send, exportName: string, hasNoZeroes: boolean): Receiver<OpenedExport> {
  send(encodeOption(OptionType.ExportName, Buffer.from(exportName)));
  const info = decodeExportInfo(yield* receiveBytes(EXPORT_INFO_BYTES));
  if (!hasNoZeroes) yield* skipBytes(124);
  return { ...info, blockSize: DEFAULT_BLOCK_SIZE };
}

function rejectReply(reply: OptionReply): never {
  throw new NbdProtocolError(`Cannot read NBD option reply: type ${reply.type} does not answer this option`);
}

function refused(act: string, refusal: Refusal): NbdServerError {
  const [errno, meaning] = ERROR_WORDS[refusal.type] ?? [
    `NBD_REP_ERR_0x${refusal.type.toString(16)}`,
    `the server refuses with error 0x${refusal.type.toString(16)}`,
  ];
  const quoted = refusal.text === "" ? "" : ` (it says: ${refusal.text})`;
  return new NbdServerError(`Cannot ${act}: ${meaning}${quoted}`, { errno });
}
