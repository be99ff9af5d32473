// SPDX-License-Identifier: AGPL-3.0-or-later
// Codecs of the handshake phase: greeting, options, option replies. Pure, in the order of the spec.

import { alignDown, toSafeNumber } from "../core/index.ts";
import {
  INIT_MAGIC,
  MAX_MINIMUM_BLOCK_BYTES,
  MAX_PAYLOAD_BYTES,
  OLDSTYLE_MAGIC,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  type OptionType,
} from "./constants.ts";
import { NbdProtocolError } from "./errors.ts";

export const GREETING_BYTES = 18;
export const OPTION_REPLY_HEADER_BYTES = 20;
export const EXPORT_INFO_BYTES = 10;
const BLOCK_SIZE_INFO_BYTES = 12;

/** "NBDMAGIC" u64 | "IHAVEOPT" u64 | handshake flags u16; 18 bytes. */
export function encodeGreeting(handshakeFlags: number): Buffer {
  const bytes = Buffer.alloc(GREETING_BYTES);
  bytes.writeBigUInt64BE(INIT_MAGIC, 0);
  bytes.writeBigUInt64BE(OPTION_MAGIC, 8);
  bytes.writeUInt16BE(handshakeFlags, 16);
  return bytes;
}

/**
 * Inverse of encodeGreeting(); returns the handshake flags.
 *
 * @throws NbdProtocolError if this is not an NBD server, or one that uses oldstyle negotiation
 */
export function decodeGreeting(bytes: Buffer): number {
  const magic = bytes.readBigUInt64BE(0);
  if (magic !== INIT_MAGIC) {
    throw new NbdProtocolError(
      `Cannot read NBD greeting: magic is 0x${magic.toString(16)}, no NBD server listens there`,
      {
        hint: "Check the address: another kind of server may listen there",
      },
    );
  }
  const style = bytes.readBigUInt64BE(8);
  if (style === OLDSTYLE_MAGIC) {
    throw new NbdProtocolError("Cannot use NBD server: it speaks the oldstyle negotiation, fixed newstyle is needed", {
      hint: "Configure the server for newstyle negotiation",
    });
  }
  if (style !== OPTION_MAGIC) {
    throw new NbdProtocolError(`Cannot read NBD greeting: second magic is 0x${style.toString(16)}`);
  }
  return bytes.readUInt16BE(16);
}

/** Client flags u32; 4 bytes. */
export function encodeClientFlags(flags: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(flags, 0);
  return bytes;
}

/** "IHAVEOPT" u64 | option u32 | data length u32 | data. */
export function encodeOption(option: OptionType, data: Buffer): Buffer {
  const header = Buffer.alloc(16);
  header.writeBigUInt64BE(OPTION_MAGIC, 0);
  header.writeUInt32BE(option, 8);
  header.writeUInt32BE(data.length, 12);
  return Buffer.concat([header, data]);
}

interface OptionReplyHeader {
  readonly option: number;
  /** A value of OptionReplyType, or one that this client does not know. */
  readonly type: number;
  readonly dataBytes: number;
}

/** magic u64 | option u32 | reply type u32 | data length u32; 20 bytes. */
export function encodeOptionReplyHeader(header: OptionReplyHeader): Buffer {
  const bytes = Buffer.alloc(OPTION_REPLY_HEADER_BYTES);
  bytes.writeBigUInt64BE(OPTION_REPLY_MAGIC, 0);
  bytes.writeUInt32BE(header.option, 8);
  bytes.writeUInt32BE(header.type, 12);
  bytes.writeUInt32BE(header.dataBytes, 16);
  return bytes;
}

/** Inverse of encodeOptionReplyHeader(). `bytes` is borrowed; it must hold at least 20 bytes. */
export function decodeOptionReplyHeader(bytes: Buffer): OptionReplyHeader {
  const magic = bytes.readBigUInt64BE(0);
  if (magic !== OPTION_REPLY_MAGIC) {
    throw new NbdProtocolError(`Cannot read NBD option reply: magic is 0x${magic.toString(16)}`);
  }
  return { option: bytes.readUInt32BE(8), type: bytes.readUInt32BE(12), dataBytes: bytes.readUInt32BE(16) };
}

/** length u32 | bytes: the form of names in options. */
function encodeString(text: string): Buffer {
  const bytes = Buffer.from(text);
  const length = Buffer.alloc(4);
  length.writeUInt32BE(bytes.length, 0);
  return Buffer.concat([length, bytes]);
}

/** NBD_OPT_GO: export name | number of information requests u16 | each u16. */
export function encodeGoData(exportName: string, infoTypes: readonly number[]): Buffer {
  const requests = Buffer.alloc(2 + 2 * infoTypes.length);
  requests.writeUInt16BE(infoTypes.length, 0);
  infoTypes.forEach((type, index) => {
    requests.writeUInt16BE(type, 2 + 2 * index);
  });
  return Buffer.concat([encodeString(exportName), requests]);
}

/** NBD_OPT_SET_META_CONTEXT and _LIST_: export name | number of queries u32 | each a string. */
export function encodeMetaContextData(exportName: string, queries: readonly string[]): Buffer {
  const count = Buffer.alloc(4);
  count.writeUInt32BE(queries.length, 0);
  return Buffer.concat([encodeString(exportName), count, ...queries.map(encodeString)]);
}

/** NBD_REP_META_CONTEXT: context id u32 | name, up to the end. */
export function decodeMetaContext(data: Buffer): { id: number; name: string } {
  if (data.length < 5) {
    throw new NbdProtocolError(
      `Cannot read NBD metadata context: it has ${data.length} bytes, expected an id and a name`,
    );
  }
  return { id: data.readUInt32BE(0), name: data.toString("utf8", 4) };
}

export interface ExportInfo {
  readonly sizeBytes: number;
  readonly transmissionFlags: number;
}

/**
 * Export size u64 | transmission flags u16: the body of NBD_INFO_EXPORT and of the answer to
 * NBD_OPT_EXPORT_NAME.
 *
 * @throws NbdProtocolError for another length, or a size that is not below 2^53
 */
export function decodeExportInfo(bytes: Buffer): ExportInfo {
  checkInfoBytes("export", bytes, EXPORT_INFO_BYTES);
  const size = bytes.readBigUInt64BE(0);
  try {
    return { sizeBytes: toSafeNumber(size, "export size"), transmissionFlags: bytes.readUInt16BE(8) };
  } catch (cause) {
    throw new NbdProtocolError(`Cannot use NBD export: its size ${size} is not below 2^53 bytes`, { cause });
  }
}

/** In bytes. Requests respect it: aligned to the minimum, payload up to the maximum. */
export interface BlockSize {
  readonly minimum: number;
  readonly preferred: number;
  readonly maximum: number;
}

/**
 * minimum u32 | preferred u32 | maximum u32: the body of NBD_INFO_BLOCK_SIZE. The returned maximum is
 * a multiple of the minimum, and no larger than this client's own payload limit.
 *
 * @throws NbdProtocolError if the three contradict each other or the specification
 */
export function decodeBlockSize(bytes: Buffer): BlockSize {
  checkInfoBytes("block size", bytes, BLOCK_SIZE_INFO_BYTES);
  const minimum = bytes.readUInt32BE(0);
  const preferred = bytes.readUInt32BE(4);
  const maximum = bytes.readUInt32BE(8);
  const isPower = minimum > 0 && (minimum & (minimum - 1)) === 0;
  if (!isPower || minimum > MAX_MINIMUM_BLOCK_BYTES || preferred < minimum || maximum < minimum) {
    throw new NbdProtocolError(
      `Cannot use NBD export: its block sizes ${minimum}, ${preferred}, ${maximum} make no sense as minimum, preferred, maximum`,
    );
  }
  return { minimum, preferred, maximum: alignDown(Math.min(maximum, MAX_PAYLOAD_BYTES), minimum) };
}

function checkInfoBytes(what: string, bytes: Buffer, wanted: number): void {
  if (bytes.length !== wanted) {
    throw new NbdProtocolError(`Cannot read NBD ${what} information: it has ${bytes.length} bytes, expected ${wanted}`);
  }
}
