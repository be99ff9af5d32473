// SPDX-License-Identifier: AGPL-3.0-or-later
// Codecs of the handshake phase: greeting, options, option replies. Pure, in the order of the spec.

import { alignDown, toSafeNumber } from "../core/index.ts";
import {
  INIT_MAGIC,
  MAX_MINIMUM_BLOCK_BYTES,
  MAX_PAYLOAD_BYTES,
  MAX_STRING_BYTES,
  OLDSTYLE_MAGIC,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  type OptionType,
} from "./constants.ts";
import { NbdProtocolError } from "./errors.ts";

export const GREETING_BYTES = 18;
export const CLIENT_FLAGS_BYTES = 4;
export const OPTION_HEADER_BYTES = 16;
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
  const bytes = Buffer.alloc(CLIENT_FLAGS_BYTES);
  bytes.writeUInt32BE(flags, 0);
  return bytes;
}

/** "IHAVEOPT" u64 | option u32 | data length u32 | data. */
export function encodeOption(option: OptionType, data: Buffer): Buffer {
  const header = Buffer.alloc(OPTION_HEADER_BYTES);
  header.writeBigUInt64BE(OPTION_MAGIC, 0);
  header.writeUInt32BE(option, 8);
  header.writeUInt32BE(data.length, 12);
  return Buffer.concat([header, data]);
}

interface OptionHeader {
  /** A value of OptionType, or one that this server does not know. */
  readonly option: number;
  readonly dataBytes: number;
}

/** The header that encodeOption() puts before the data; undefined if the magic number is wrong. */
export function decodeOptionHeader(bytes: Buffer): OptionHeader | undefined {
  if (bytes.readBigUInt64BE(0) !== OPTION_MAGIC) return undefined;
  return { option: bytes.readUInt32BE(8), dataBytes: bytes.readUInt32BE(12) };
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
  return Buffer.concat([u32(bytes.length), bytes]);
}

interface DecodedString {
  readonly text: string;
  /** Where the next field starts. */
  readonly end: number;
}

/** Inverse of encodeString(); undefined if `bytes` ends inside it, or it is longer than the protocol allows. */
function decodeString(bytes: Buffer, at: number): DecodedString | undefined {
  if (bytes.length < at + 4) return undefined;
  const end = at + 4 + bytes.readUInt32BE(at);
  if (end > bytes.length || end - at - 4 > MAX_STRING_BYTES) return undefined;
  return { text: bytes.toString("utf8", at + 4, end), end };
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

interface GoData {
  readonly exportName: string;
  readonly infoTypes: ReadonlySet<number>;
}

/** Inverse of encodeGoData(), also for NBD_OPT_INFO; undefined unless `data` is exactly that. */
export function decodeGoData(data: Buffer): GoData | undefined {
  const name = decodeString(data, 0);
  if (name === undefined || data.length < name.end + 2) return undefined;
  const count = data.readUInt16BE(name.end);
  if (data.length !== name.end + 2 + 2 * count) return undefined;
  const infoTypes = new Set<number>();
  for (let at = name.end + 2; at < data.length; at += 2) infoTypes.add(data.readUInt16BE(at));
  return { exportName: name.text, infoTypes };
}

/** NBD_OPT_SET_META_CONTEXT and _LIST_: export name | number of queries u32 | each a string. */
export function encodeMetaContextData(exportName: string, queries: readonly string[]): Buffer {
  return Buffer.concat([encodeString(exportName), u32(queries.length), ...queries.map(encodeString)]);
}

interface MetaContextData {
  readonly exportName: string;
  readonly queries: readonly string[];
}

/** Inverse of encodeMetaContextData(); undefined unless `data` is exactly that. */
export function decodeMetaContextData(data: Buffer): MetaContextData | undefined {
  const name = decodeString(data, 0);
  if (name === undefined || data.length < name.end + 4) return undefined;
  const queries: string[] = [];
  let at = name.end + 4;
  for (let left = data.readUInt32BE(name.end); left > 0; left--) {
    const query = decodeString(data, at);
    if (query === undefined) return undefined;
    queries.push(query.text);
    at = query.end;
  }
  return at === data.length ? { exportName: name.text, queries } : undefined;
}

/** context id u32 | name: the data of NBD_REP_META_CONTEXT. */
export function encodeMetaContext(id: number, name: string): Buffer {
  return Buffer.concat([u32(id), Buffer.from(name)]);
}

/** Inverse of encodeMetaContext(). NBD_REP_META_CONTEXT: context id u32 | name, up to the end. */
export function decodeMetaContext(data: Buffer): { id: number; name: string } {
  if (data.length < 5) {
    throw new NbdProtocolError(
      `Cannot read NBD metadata context: it has ${data.length} bytes, expected an id and a name`,
    );
  }
  return { id: data.readUInt32BE(0), name: data.toString("utf8", 4) };
}

/** name length u32 | name | description: the data of NBD_REP_SERVER. */
export function encodeServer(name: string, description: string): Buffer {
  return Buffer.concat([encodeString(name), Buffer.from(description)]);
}

export interface ExportInfo {
  readonly sizeBytes: number;
  readonly transmissionFlags: number;
}

/** Export size u64 | transmission flags u16; 10 bytes. */
export function encodeExportInfo(info: ExportInfo): Buffer {
  const bytes = Buffer.alloc(EXPORT_INFO_BYTES);
  bytes.writeBigUInt64BE(BigInt(info.sizeBytes), 0);
  bytes.writeUInt16BE(info.transmissionFlags, 8);
  return bytes;
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

/** minimum u32 | preferred u32 | maximum u32; 12 bytes. */
export function encodeBlockSize({ minimum, preferred, maximum }: BlockSize): Buffer {
  return Buffer.concat([u32(minimum), u32(preferred), u32(maximum)]);
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

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value, 0);
  return bytes;
}
