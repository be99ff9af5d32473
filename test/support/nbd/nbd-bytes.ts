// SPDX-License-Identifier: AGPL-3.0-or-later
// NBD messages written by hand from the specification; they share nothing with the codecs in src/nbd.

export const u16 = (value: number): string => value.toString(16).padStart(4, "0");
export const u32 = (value: number): string => value.toString(16).padStart(8, "0");
export const u64 = (value: number | bigint): string => value.toString(16).padStart(16, "0");
export const text = (value: string): string => Buffer.from(value).toString("hex");

/** Joins hex fields into bytes. */
export const bytes = (...fields: string[]): Buffer => Buffer.from(fields.join(""), "hex");

const textBytes = (value: string): number => Buffer.byteLength(value);

/** NBDMAGIC, IHAVEOPT, handshake flags (1: fixed newstyle, 2: no zeroes). */
export const greeting = (flags = 3): Buffer => bytes("4e42444d41474943", "49484156454f5054", u16(flags));

/** Option reply: magic, option, reply type, data. */
export const optionReply = (option: number, type: number, data = ""): Buffer =>
  bytes("0003e889045565a9", u32(option), u32(type), u32(data.length / 2), data);

/** Client flags, the client's answer to the greeting. */
export const clientFlags = (flags = 3): Buffer => bytes(u32(flags));
/** Option: IHAVEOPT, option, data. */
export const option = (number: number, data = ""): Buffer =>
  bytes("49484156454f5054", u32(number), u32(data.length / 2), data);
/** A string with its length before it. */
const sized = (value: string): string => u32(textBytes(value)) + text(value);
/** NBD_OPT_GO or NBD_OPT_INFO: name, count of information types, each of them. */
export const goOption = (number: number, name: string, ...types: number[]): Buffer =>
  option(number, sized(name) + u16(types.length) + types.map(u16).join(""));
/** NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT: name, count of queries, each of them. */
export const contextOption = (number: number, name: string, ...queries: string[]): Buffer =>
  option(number, sized(name) + u32(queries.length) + queries.map(sized).join(""));
/** Request: magic, flags, type, cookie, offset, length. */
export const request = (
  type: number,
  cookie: number | bigint,
  offset: number | bigint,
  length: number,
  flags = 0,
): Buffer => bytes("25609513", u16(flags), u16(type), u64(cookie), u64(offset), u32(length));

export const REP_ACK = 1;
export const REP_SERVER = 2;
export const REP_INFO = 3;
export const REP_ERR_UNSUP = 0x80000001;
export const REP_ERR_POLICY = 0x80000002;
export const REP_ERR_INVALID = 0x80000003;
export const REP_ERR_UNKNOWN = 0x80000006;
export const OPT_EXPORT_NAME = 1;
export const OPT_ABORT = 2;
export const OPT_LIST = 3;
export const OPT_STARTTLS = 5;
export const OPT_INFO = 6;
export const OPT_GO = 7;
export const OPT_STRUCTURED_REPLY = 8;
export const OPT_LIST_META_CONTEXT = 9;
export const OPT_SET_META_CONTEXT = 10;
export const CMD_READ = 0;
export const CMD_WRITE = 1;
export const CMD_DISC = 2;
export const CMD_TRIM = 4;
export const CMD_WRITE_ZEROES = 6;
export const CMD_BLOCK_STATUS = 7;
export const CMD_FLAG_DF = 4;
export const CMD_FLAG_REQ_ONE = 8;
export const EPERM = 1;
export const EIO = 5;
export const EINVAL = 22;

/** NBD_REP_INFO with NBD_INFO_EXPORT: size u64, transmission flags u16. */
export const exportInfo = (sizeBytes: number | bigint, flags: number): Buffer =>
  optionReply(OPT_GO, 3, `0000${u64(sizeBytes)}${u16(flags)}`);
/** NBD_REP_INFO with NBD_INFO_BLOCK_SIZE: three u32. */
export const blockSizeInfo = (minimum: number, preferred: number, maximum: number): Buffer =>
  optionReply(OPT_GO, 3, `0003${u32(minimum)}${u32(preferred)}${u32(maximum)}`);
/** NBD_REP_META_CONTEXT: id u32, name. */
export const contextReply = (option: number, id: number, name: string): Buffer =>
  optionReply(option, 4, u32(id) + text(name));
/** Simple reply: magic, error, cookie. */
export const simpleReply = (cookie: number | bigint, error = 0): Buffer => bytes("67446698", u32(error), u64(cookie));

/** Structured reply chunk: magic, flags (1: done), type, cookie, payload length, payload. */
export const chunk = (cookie: number | bigint, type: number, flags: number, payload = ""): Buffer =>
  bytes("668e33ef", u16(flags), u16(type), u64(cookie), u32(payload.length / 2), payload);

export const DONE = 1;
export const noneChunk = (cookie: bigint): Buffer => chunk(cookie, 0, DONE);
export const dataChunk = (cookie: bigint, flags: number, offset: number, data: Buffer): Buffer =>
  chunk(cookie, 1, flags, u64(offset) + data.toString("hex"));
export const holeChunk = (cookie: bigint, flags: number, offset: number, length: number): Buffer =>
  chunk(cookie, 2, flags, u64(offset) + u32(length));
/** Context id, then length and flags of each extent. */
export const statusChunk = (
  cookie: bigint,
  flags: number,
  contextId: number,
  extents: Array<[number, number]>,
): Buffer =>
  chunk(cookie, 5, flags, u32(contextId) + extents.map(([length, status]) => u32(length) + u32(status)).join(""));
export const errorChunk = (cookie: bigint, flags: number, errno: number, message = ""): Buffer =>
  chunk(cookie, 0x8001, flags, u32(errno) + u16(textBytes(message)) + text(message));
