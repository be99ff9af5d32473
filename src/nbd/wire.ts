// SPDX-License-Identifier: AGPL-3.0-or-later
// Codecs of the transmission phase: requests, simple replies, structured chunks. Pure, each decoder
// beside its encoder. replies.ts decides whether a message fits the conversation.

import { toSafeNumber } from "../core/index.ts";
import { MAX_STATUS_EXTENTS, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC } from "./constants.ts";
import { NbdProtocolError } from "./errors.ts";

export const REQUEST_BYTES = 28;
export const SIMPLE_REPLY_BYTES = 16;
export const CHUNK_HEADER_BYTES = 20;
/** The offset in front of the data of a chunk. */
export const DATA_OFFSET_BYTES = 8;
export const HOLE_CHUNK_BYTES = 12;
export const STATUS_ENTRY_BYTES = 8;

export interface NbdRequest {
  /** A value of CommandType, or one that this server does not know. */
  readonly type: number;
  readonly flags: number;
  readonly cookie: bigint;
  /** Bytes from the start of the export. */
  readonly offset: number;
  /** Bytes; u32. */
  readonly length: number;
}

/** magic u32 | command flags u16 | type u16 | cookie u64 | offset u64 | length u32; 28 bytes. */
export function encodeRequest(request: NbdRequest): Buffer {
  const bytes = Buffer.allocUnsafe(REQUEST_BYTES);
  bytes.writeUInt32BE(REQUEST_MAGIC, 0);
  bytes.writeUInt16BE(request.flags, 4);
  bytes.writeUInt16BE(request.type, 6);
  bytes.writeBigUInt64BE(request.cookie, 8);
  bytes.writeBigUInt64BE(BigInt(request.offset), 16);
  bytes.writeUInt32BE(request.length, 24);
  return bytes;
}

/**
 * Inverse of encodeRequest(); undefined if the magic number is wrong, and then nothing after it can be read.
 * An offset beyond 2^53 is rounded, but not to one that lies in an export. `bytes` is borrowed; it must hold at
 * least 28 bytes.
 */
export function decodeRequest(bytes: Buffer): NbdRequest | undefined {
  if (bytes.readUInt32BE(0) !== REQUEST_MAGIC) return undefined;
  return {
    flags: bytes.readUInt16BE(4),
    type: bytes.readUInt16BE(6),
    cookie: bytes.readBigUInt64BE(8),
    offset: Number(bytes.readBigUInt64BE(16)),
    length: bytes.readUInt32BE(24),
  };
}

interface SimpleReply {
  /** 0 or an error value. */
  readonly error: number;
  readonly cookie: bigint;
}

/** magic u32 | error u32 | cookie u64; 16 bytes. The payload of a READ follows without a length. */
export function encodeSimpleReply(reply: SimpleReply): Buffer {
  const bytes = Buffer.allocUnsafe(SIMPLE_REPLY_BYTES);
  putSimpleReply(bytes, 0, reply);
  return bytes;
}

/** encodeSimpleReply() in front of a payload that is in `bytes` already. */
export function putSimpleReply(bytes: Buffer, at: number, reply: SimpleReply): void {
  bytes.writeUInt32BE(SIMPLE_REPLY_MAGIC, at);
  bytes.writeUInt32BE(reply.error, at + 4);
  bytes.writeBigUInt64BE(reply.cookie, at + 8);
}

/** Inverse of encodeSimpleReply(). `bytes` is borrowed; it must hold at least 16 bytes. */
export function decodeSimpleReply(bytes: Buffer): SimpleReply {
  checkReplyMagic(bytes.readUInt32BE(0), SIMPLE_REPLY_MAGIC);
  return { error: bytes.readUInt32BE(4), cookie: bytes.readBigUInt64BE(8) };
}

export interface ChunkHeader {
  readonly flags: number;
  /** A value of ChunkType, or one that this client does not know. */
  readonly type: number;
  readonly cookie: bigint;
  readonly payloadBytes: number;
}

/** magic u32 | flags u16 | type u16 | cookie u64 | payload length u32; 20 bytes. */
export function encodeChunkHeader(header: ChunkHeader): Buffer {
  const bytes = Buffer.allocUnsafe(CHUNK_HEADER_BYTES);
  putChunkHeader(bytes, 0, header);
  return bytes;
}

/** encodeChunkHeader() in front of a payload that is in `bytes` already. */
export function putChunkHeader(bytes: Buffer, at: number, header: ChunkHeader): void {
  bytes.writeUInt32BE(STRUCTURED_REPLY_MAGIC, at);
  bytes.writeUInt16BE(header.flags, at + 4);
  bytes.writeUInt16BE(header.type, at + 6);
  bytes.writeBigUInt64BE(header.cookie, at + 8);
  bytes.writeUInt32BE(header.payloadBytes, at + 16);
}

/** Inverse of encodeChunkHeader(). `bytes` is borrowed; it must hold at least 20 bytes. */
export function decodeChunkHeader(bytes: Buffer): ChunkHeader {
  checkReplyMagic(bytes.readUInt32BE(0), STRUCTURED_REPLY_MAGIC);
  return {
    flags: bytes.readUInt16BE(4),
    type: bytes.readUInt16BE(6),
    cookie: bytes.readBigUInt64BE(8),
    payloadBytes: bytes.readUInt32BE(16),
  };
}

/** Both kinds of reply begin with a magic number, which tells which kind this is. */
export const readReplyMagic = (bytes: Buffer): number => bytes.readUInt32BE(0);

function checkReplyMagic(magic: number, wanted: number): void {
  if (magic !== wanted) throw badReplyMagic(magic);
}

export function badReplyMagic(magic: number): NbdProtocolError {
  return new NbdProtocolError(
    `Cannot read NBD reply: magic is ${hex(magic)}, ${hex(SIMPLE_REPLY_MAGIC)} or ${hex(STRUCTURED_REPLY_MAGIC)} was expected`,
  );
}

/** A u64 offset inside a payload. @throws NbdProtocolError if it is not below 2^53 */
export function decodeOffset(bytes: Buffer, at: number): number {
  const value = bytes.readBigUInt64BE(at);
  try {
    return toSafeNumber(value, "offset");
  } catch (cause) {
    throw new NbdProtocolError(`Cannot read NBD reply: offset ${value} is not below 2^53`, { cause });
  }
}

/** A range with the flags of one metadata context, in bytes from the start of the export. */
export interface BlockStatusExtent {
  readonly offset: number;
  readonly length: number;
  readonly flags: number;
}

/** @throws NbdProtocolError unless the length fits a context id and 1 to 2^20 entries */
export function checkStatusPayloadBytes(payloadBytes: number): void {
  const entryBytes = payloadBytes - 4;
  const isWhole = entryBytes >= STATUS_ENTRY_BYTES && entryBytes % STATUS_ENTRY_BYTES === 0;
  if (!isWhole || entryBytes / STATUS_ENTRY_BYTES > MAX_STATUS_EXTENTS) {
    throw new NbdProtocolError(
      `Cannot read NBD block status: payload has ${payloadBytes} bytes, 4 + 8 per extent with 1 to ${MAX_STATUS_EXTENTS} extents was expected`,
    );
  }
}

/**
 * Decodes a block status payload, clips it to the request and joins neighbours with equal flags.
 *
 * @param bytes borrowed; its length has passed checkStatusPayloadBytes()
 * @param offset start of the request, which is the start of the first extent
 * @param length length of the request; only the last extent may reach beyond it
 * @throws NbdProtocolError for an extent of length zero, or one that starts beyond the request
 */
export function decodeStatusPayload(
  bytes: Buffer,
  offset: number,
  length: number,
): { contextId: number; extents: BlockStatusExtent[] } {
  const extents: BlockStatusExtent[] = [];
  const end = offset + length;
  let start = offset;
  let at = offset;
  let flags = bytes.readUInt32BE(8);
  for (let entry = 4; entry < bytes.length; entry += STATUS_ENTRY_BYTES) {
    const entryBytes = bytes.readUInt32BE(entry);
    const entryFlags = bytes.readUInt32BE(entry + 4);
    if (entryBytes === 0) throw new NbdProtocolError(`Cannot read NBD block status: extent at ${at} has no length`);
    if (at >= end) {
      throw new NbdProtocolError(
        `Cannot read NBD block status: extent at ${at} is beyond the request, which ends at ${end}`,
      );
    }
    if (entryFlags !== flags) {
      if (at > start) extents.push({ offset: start, length: at - start, flags });
      start = at;
      flags = entryFlags;
    }
    at += entryBytes;
  }
  extents.push({ offset: start, length: Math.min(at, end) - start, flags });
  return { contextId: bytes.readUInt32BE(0), extents };
}

interface ErrorChunk {
  readonly error: number;
  readonly text: string;
  /** Where the error happened; only in NBD_REPLY_TYPE_ERROR_OFFSET. */
  readonly offset: number | undefined;
}

/** error u32 | message length u16 | message | (offset u64 in ERROR_OFFSET). */
export function encodeErrorPayload(chunk: ErrorChunk): Buffer {
  const text = Buffer.from(chunk.text);
  const bytes = Buffer.alloc(6 + text.length + (chunk.offset === undefined ? 0 : 8));
  bytes.writeUInt32BE(chunk.error, 0);
  bytes.writeUInt16BE(text.length, 4);
  text.copy(bytes, 6);
  if (chunk.offset !== undefined) bytes.writeBigUInt64BE(BigInt(chunk.offset), 6 + text.length);
  return bytes;
}

/**
 * Inverse of encodeErrorPayload(). `bytes` is borrowed. Anything after the known fields is ignored:
 * error types that this client does not know may carry more.
 *
 * @throws NbdProtocolError if the payload is shorter than its fields
 */
export function decodeErrorPayload(bytes: Buffer, hasOffset: boolean): ErrorChunk {
  const fixedBytes = hasOffset ? 14 : 6;
  const textBytes = bytes.length >= fixedBytes ? bytes.readUInt16BE(4) : 0;
  if (bytes.length < fixedBytes + textBytes) {
    throw new NbdProtocolError(
      `Cannot read NBD error: payload has ${bytes.length} bytes, expected at least ${fixedBytes + textBytes}`,
    );
  }
  return {
    error: bytes.readUInt32BE(0),
    text: bytes.toString("utf8", 6, 6 + textBytes),
    offset: hasOffset ? decodeOffset(bytes, 6 + textBytes) : undefined,
  };
}

const hex = (value: number): string => `0x${value.toString(16)}`;
