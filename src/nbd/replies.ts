// SPDX-License-Identifier: AGPL-3.0-or-later
// The transmission phase from the client's side: reads replies forever and settles commands.
// There are two kinds of fault, never mixed: an error reply, or a reply that ends incomplete, fails its command;
// a violation of the rules of framing or content is thrown and kills the connection, as the protocol
// demands ("the client MUST initiate a hard disconnect"). Source: NBD doc/proto.md, "Transmission".

import type { CommandTable, PendingCommand } from "./command.ts";
import {
  ChunkFlag,
  ChunkType,
  CommandType,
  isErrorChunk,
  MAX_CHUNK_BYTES,
  MAX_ERROR_CHUNK_BYTES,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
} from "./constants.ts";
import { NbdProtocolError } from "./errors.ts";
import { type Receiver, receiveBytes } from "./receiver.ts";
import {
  badReplyMagic,
  CHUNK_HEADER_BYTES,
  type ChunkHeader,
  checkStatusPayloadBytes,
  decodeChunkHeader,
  decodeErrorPayload,
  decodeOffset,
  decodeSimpleReply,
  decodeStatusPayload,
  HOLE_CHUNK_BYTES,
  readReplyMagic,
  SIMPLE_REPLY_BYTES,
} from "./wire.ts";

interface ReplySession {
  readonly hasStructuredReplies: boolean;
  /** Negotiated metadata contexts: id to name. */
  readonly contexts: ReadonlyMap<number, string>;
  readonly commands: CommandTable;
}

/** Reads replies until something throws. @throws NbdProtocolError */
export function* receiveReplies(session: ReplySession): Receiver<never> {
  const header = Buffer.alloc(CHUNK_HEADER_BYTES);
  const start = header.subarray(0, SIMPLE_REPLY_BYTES);
  const rest = header.subarray(SIMPLE_REPLY_BYTES);
  for (;;) {
    yield start;
    const magic = readReplyMagic(start);
    if (magic === SIMPLE_REPLY_MAGIC) {
      yield* receiveSimpleReply(session, start);
    } else if (magic === STRUCTURED_REPLY_MAGIC) {
      if (!session.hasStructuredReplies) {
        throw new NbdProtocolError("Cannot read NBD reply: it is structured, which was not negotiated");
      }
      yield rest;
      yield* receiveChunk(session, decodeChunkHeader(header));
    } else {
      throw badReplyMagic(magic);
    }
  }
}

function* receiveSimpleReply(session: ReplySession, bytes: Buffer): Receiver<void> {
  const reply = decodeSimpleReply(bytes);
  const command = session.commands.get(reply.cookie);
  if (reply.error !== 0) {
    command.noteServerError(reply.error, "", undefined);
  } else if (command.target !== undefined) {
    if (session.hasStructuredReplies) {
      throw new NbdProtocolError(`Cannot ${command.description}: the reply is simple, a structured one was negotiated`);
    }
    yield command.target;
  } else if (command.request.type === CommandType.BlockStatus) {
    throw new NbdProtocolError(`Cannot ${command.description}: the reply is simple and carries no status`);
  }
  session.commands.finish(command);
}

function* receiveChunk(session: ReplySession, header: ChunkHeader): Receiver<void> {
  if (header.payloadBytes > MAX_CHUNK_BYTES) {
    throw new NbdProtocolError(
      `Cannot read NBD reply: chunk has ${header.payloadBytes} bytes, at most ${MAX_CHUNK_BYTES} are allowed`,
    );
  }
  const command = session.commands.get(header.cookie);
  const isDone = (header.flags & ChunkFlag.Done) !== 0;
  if (isErrorChunk(header.type)) {
    yield* receiveError(command, header);
  } else if (header.type === ChunkType.None) {
    if (header.payloadBytes !== 0 || !isDone) {
      throw unexpectedChunk(command, "an empty chunk carries a payload, or is not the last one");
    }
  } else if (header.type === ChunkType.OffsetData && command.target !== undefined) {
    yield* receiveData(command, command.target, header.payloadBytes);
  } else if (header.type === ChunkType.OffsetHole && command.target !== undefined) {
    yield* receiveHole(command, command.target, header.payloadBytes);
  } else if (header.type === ChunkType.BlockStatus && command.request.type === CommandType.BlockStatus) {
    yield* receiveStatus(session, command, header.payloadBytes);
  } else {
    throw unexpectedChunk(command, `a chunk of type ${header.type} does not answer it`);
  }
  if (isDone) {
    checkComplete(session, command);
    session.commands.finish(command);
  }
}

function* receiveData(command: PendingCommand, target: Buffer, payloadBytes: number): Receiver<void> {
  if (payloadBytes < 9) throw unexpectedChunk(command, `a data chunk has ${payloadBytes} bytes, expected at least 9`);
  const offset = decodeOffset(yield* receiveBytes(8), 0);
  yield claim(command, target, offset, payloadBytes - 8);
}

function* receiveHole(command: PendingCommand, target: Buffer, payloadBytes: number): Receiver<void> {
  if (payloadBytes !== HOLE_CHUNK_BYTES) {
    throw unexpectedChunk(command, `a hole chunk has ${payloadBytes} bytes, expected ${HOLE_CHUNK_BYTES}`);
  }
  const payload = yield* receiveBytes(HOLE_CHUNK_BYTES);
  const length = payload.readUInt32BE(8);
  if (length === 0) throw unexpectedChunk(command, "a hole chunk has no length");
  claim(command, target, decodeOffset(payload, 0), length).fill(0);
}

/** The part of the target that a content chunk fills. @throws NbdProtocolError unless all of it is new and inside */
function claim(command: PendingCommand, target: Buffer, offset: number, length: number): Buffer {
  const start = offset - command.request.offset;
  if (start < 0 || start + length > target.length) {
    throw unexpectedChunk(command, `a chunk of ${length} bytes at ${offset} is outside the request`);
  }
  if (!command.coverage.add(start, start + length)) {
    throw unexpectedChunk(command, `a chunk of ${length} bytes at ${offset} repeats bytes, or the pieces are too many`);
  }
  return target.subarray(start, start + length);
}

function* receiveStatus(session: ReplySession, command: PendingCommand, payloadBytes: number): Receiver<void> {
  checkStatusPayloadBytes(payloadBytes);
  const { offset, length } = command.request;
  const { contextId, extents } = decodeStatusPayload(yield* receiveBytes(payloadBytes), offset, length);
  if (!session.contexts.has(contextId)) {
    throw unexpectedChunk(command, `the metadata context ${contextId} was not negotiated`);
  }
  if (command.statuses.has(contextId)) {
    throw unexpectedChunk(command, `the metadata context ${contextId} is answered twice`);
  }
  command.statuses.set(contextId, extents);
}

function* receiveError(command: PendingCommand, header: ChunkHeader): Receiver<void> {
  if (header.payloadBytes > MAX_ERROR_CHUNK_BYTES) {
    throw unexpectedChunk(
      command,
      `an error chunk has ${header.payloadBytes} bytes, at most ${MAX_ERROR_CHUNK_BYTES} are allowed`,
    );
  }
  const payload = yield* receiveBytes(header.payloadBytes);
  const chunk = decodeErrorPayload(payload, header.type === ChunkType.ErrorOffset);
  if (chunk.error === 0) command.noteProtocolError("the NBD server answers an error without a number");
  else command.noteServerError(chunk.error, chunk.text, chunk.offset);
}

/** A reply that ends must be complete; if the server said why it is not, that error was recorded first. */
function checkComplete(session: ReplySession, command: PendingCommand): void {
  const { target, coverage, statuses, request } = command;
  if (target !== undefined && coverage.coveredBytes !== target.length) {
    command.noteProtocolError(`the NBD server sent only ${coverage.coveredBytes} of ${target.length} bytes`);
  }
  if (request.type === CommandType.BlockStatus && statuses.size !== session.contexts.size) {
    command.noteProtocolError(
      `the NBD server answered for ${statuses.size} of ${session.contexts.size} metadata contexts`,
    );
  }
}

function unexpectedChunk(command: PendingCommand, state: string): NbdProtocolError {
  return new NbdProtocolError(`Cannot ${command.description}: ${state}`);
}
