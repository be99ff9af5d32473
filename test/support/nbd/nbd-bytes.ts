// SPDX-License-Identifier: AGPL-3.0-or-later
// NBD messages written by hand from the specification; they share nothing with the client's own codecs.

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

export const REP_ACK = 1;
export const REP_ERR_UNSUP = 0x80000001;
export const REP_ERR_POLICY = 0x80000002;
export const REP_ERR_UNKNOWN = 0x80000006;
export const OPT_EXPORT_NAME = 1;
export const OPT_GO = 7;
export const OPT_STRUCTURED_REPLY = 8;
export const OPT_SET_META_CONTEXT = 10;
export const CMD_READ = 0;
export const CMD_WRITE = 1;
export const CMD_DISC = 2;
export const CMD_TRIM = 4;
export const CMD_BLOCK_STATUS = 7;
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
/** NBD_REP_SERVER: name length u32, name, description. */
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
