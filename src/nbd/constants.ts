// SPDX-License-Identifier: AGPL-3.0-or-later
// The NBD wire format in the order of the specification (NBD doc/proto.md). All integers are
// unsigned and big-endian. Our own limits, which the protocol does not set, are at the end.

/** "Newstyle negotiation": the server speaks first, with "NBDMAGIC" and "IHAVEOPT". */
export const INIT_MAGIC = 0x4e42444d41474943n;
export const OPTION_MAGIC = 0x49484156454f5054n;
/** "Oldstyle negotiation": takes the place of newstyle's IHAVEOPT. */
export const OLDSTYLE_MAGIC = 0x00420281861253n;
export const OPTION_REPLY_MAGIC = 0x3e889045565a9n;

/** "Request message". */
export const REQUEST_MAGIC = 0x25609513;
/** "Simple reply message". */
export const SIMPLE_REPLY_MAGIC = 0x67446698;
/** "Structured reply chunk message". */
export const STRUCTURED_REPLY_MAGIC = 0x668e33ef;

/** "Handshake flags", u16 of the server; the client flags (u32) have the same two bits. */
export const HandshakeFlag = { FixedNewstyle: 1 << 0, NoZeroes: 1 << 1 } as const;

/** "Transmission flags", u16. */
export const TransmissionFlag = {
  HasFlags: 1 << 0,
  ReadOnly: 1 << 1,
  SendFlush: 1 << 2,
  SendFua: 1 << 3,
  Rotational: 1 << 4,
  SendTrim: 1 << 5,
  SendWriteZeroes: 1 << 6,
  SendDf: 1 << 7,
  CanMultiConn: 1 << 8,
} as const;

/** "Option types". */
export const OptionType = {
  ExportName: 1,
  Abort: 2,
  List: 3,
  StartTls: 5,
  Info: 6,
  Go: 7,
  StructuredReply: 8,
  ListMetaContext: 9,
  SetMetaContext: 10,
} as const;
export type OptionType = (typeof OptionType)[keyof typeof OptionType];

/** "Option reply types". */
export const OptionReplyType = {
  Ack: 1,
  Server: 2,
  Info: 3,
  MetaContext: 4,
  ErrUnsup: 0x80000001,
  ErrPolicy: 0x80000002,
  ErrInvalid: 0x80000003,
  ErrPlatform: 0x80000004,
  ErrTlsReqd: 0x80000005,
  ErrUnknown: 0x80000006,
  ErrShutdown: 0x80000007,
  ErrBlockSizeReqd: 0x80000008,
  ErrTooBig: 0x80000009,
} as const;
export type OptionReplyType = (typeof OptionReplyType)[keyof typeof OptionReplyType];
/** Bit 31 marks every error reply, including types that this table has no name for. */
export const isErrorOptionReply = (type: number): boolean => type >= 0x80000000;

/** "NBD_INFO" information types of NBD_OPT_GO. */
export const InfoType = { Export: 0, Name: 1, Description: 2, BlockSize: 3 } as const;

/** "Metadata contexts" that every server may offer, and the flags of base:allocation. */
export const BASE_ALLOCATION = "base:allocation";
/** Status flags of `base:allocation`: a hole may read as anything unless Zero is set too. */
export const AllocationFlag = { Hole: 1 << 0, Zero: 1 << 1 } as const;
/** Status flags of `qemu:dirty-bitmap:<name>`. Source: QEMU docs/interop/nbd.txt. */
export const DirtyFlag = { Dirty: 1 << 0 } as const;

/** "Request types". */
export const CommandType = {
  Read: 0,
  Write: 1,
  Disc: 2,
  Flush: 3,
  Trim: 4,
  WriteZeroes: 6,
  BlockStatus: 7,
} as const;
export type CommandType = (typeof CommandType)[keyof typeof CommandType];

/** "Command flags", u16. */
export const CommandFlag = { Fua: 1 << 0, NoHole: 1 << 1, Df: 1 << 2, ReqOne: 1 << 3, FastZero: 1 << 4 } as const;

/** "Structured reply flags", "Structured reply types" and "Error chunk types". */
export const ChunkFlag = { Done: 1 << 0 } as const;
export const ChunkType = {
  None: 0,
  OffsetData: 1,
  OffsetHole: 2,
  BlockStatus: 5,
  Error: 0x8001,
  ErrorOffset: 0x8002,
} as const;
/** Bit 15 marks every error chunk, including types that this table has no name for. */
export const isErrorChunk = (type: number): boolean => (type & 0x8000) !== 0;

/** "Error values": those that this server answers. */
export const ErrorValue = { Eperm: 1, Eio: 5, Einval: 22 } as const;
/** "Error values", by number. */
const ERRNO_NAMES: Readonly<Record<number, string>> = {
  1: "EPERM",
  5: "EIO",
  12: "ENOMEM",
  22: "EINVAL",
  28: "ENOSPC",
  75: "EOVERFLOW",
  95: "ENOTSUP",
  108: "ESHUTDOWN",
};
/** "EINVAL" for 22; "ERRNO_<n>" for a number the protocol does not define. */
export const errnoName = (error: number): string => ERRNO_NAMES[error] ?? `ERRNO_${error}`;

/** "Strings": names, descriptions and error texts are at most this long, in bytes. */
export const MAX_STRING_BYTES = 4096;
/** "Block size constraints": what applies if the server says nothing. */
export const DEFAULT_BLOCK_SIZE = { minimum: 1, preferred: 4096, maximum: 32 * 1024 * 1024 } as const;
/** "Block size constraints": the minimum is a power of two up to this. */
export const MAX_MINIMUM_BLOCK_BYTES = 64 * 1024;

// Limits of this client and this server. A peer that goes beyond them is not trusted.

/** Payload of one READ or WRITE; every server accepts this without block size information. */
export const MAX_PAYLOAD_BYTES = DEFAULT_BLOCK_SIZE.maximum;
/** Length of one TRIM, WRITE_ZEROES or BLOCK_STATUS; these carry no payload, so the limit is generous. */
export const MAX_RANGE_BYTES = 1024 * 1024 * 1024;
/** One option reply: two strings and a few integers fit many times over. */
export const MAX_OPTION_REPLY_BYTES = 64 * 1024;
/** Informational replies to one option before the final one: more than a node can export. */
export const MAX_OPTION_REPLIES = 65_536;
/** One structured chunk: a whole READ and its offset. Beyond this, the frame itself is not trusted. */
export const MAX_CHUNK_BYTES = 2 * MAX_PAYLOAD_BYTES + 8;
/** Extents of one BLOCK_STATUS chunk; the protocol's own advice to servers is 2^20. */
export const MAX_STATUS_EXTENTS = 1024 * 1024;
/** An error chunk: numbers, and a text that may be as long as a string. */
export const MAX_ERROR_CHUNK_BYTES = 4 * MAX_STRING_BYTES;
/** Separate pieces of one READ that may stand alone before their neighbours arrive. */
export const MAX_READ_PIECES = 8192;
/** How much of an error text goes into a message or a reply, in characters. */
export const MAX_QUOTED_TEXT = 300;

// Limits of this server. A peer that goes beyond them is disconnected.

/** Data of one option: a name and several metadata contexts of full length. */
export const MAX_OPTION_BYTES = 32 * 1024;
