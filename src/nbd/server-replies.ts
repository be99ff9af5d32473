// SPDX-License-Identifier: AGPL-3.0-or-later
// Answers READ and BLOCK_STATUS. Everything is put together in the request's one buffer, headers included, and
// leaves it without a copy. Source: NBD doc/proto.md, "Structured reply types".

import { alignDown, alignUp } from "../core/index.ts";
import { AllocationFlag, ChunkFlag, ChunkType, CommandFlag, MAX_QUOTED_TEXT } from "./constants.ts";
import { bufferBytesFor, PAYLOAD_AT, PIECE_BYTES } from "./server-buffers.ts";
import { EXPORT_BLOCK_BYTES, mapExport, type Run, readExport } from "./server-export.ts";
import { ALLOCATION_CONTEXT_ID, type ChosenExport } from "./server-options.ts";
import {
  CHUNK_HEADER_BYTES,
  DATA_OFFSET_BYTES,
  encodeChunkHeader,
  encodeErrorPayload,
  encodeSimpleReply,
  HOLE_CHUNK_BYTES,
  type NbdRequest,
  putChunkHeader,
  putSimpleReply,
  SIMPLE_REPLY_BYTES,
  STATUS_ENTRY_BYTES,
} from "./wire.ts";

/** Chunks of one piece of a READ: behind the last one that fits, holes are read like data. */
const MAX_PIECE_RUNS = 64;
/** Extents of one BLOCK_STATUS; the client asks again for what is left out. */
const MAX_STATUS_RUNS = 4096;
/** The buffer of a BLOCK_STATUS. */
export const STATUS_BUFFER_BYTES = bufferBytesFor(MAX_STATUS_RUNS * STATUS_ENTRY_BYTES);

export interface Answering {
  readonly chosen: ChosenExport;
  readonly request: NbdRequest;
  readonly buffer: Buffer;
  /** Sends all of `parts`; resolves when they may be used again. */
  readonly send: (parts: readonly Buffer[]) => Promise<void>;
  readonly signal: AbortSignal;
}

/** The size of the buffer for a READ of `length` bytes. */
export const readBufferBytes = (length: number): number => bufferBytesFor(Math.min(length, PIECE_BYTES));

/**
 * Answers a READ, piece by piece.
 *
 * @param onBegun called when part of the reply is sent after which no error can be: without chunks, or with one for all
 * @throws ExportFailure
 */
export async function answerRead(answering: Answering, onBegun: () => void): Promise<void> {
  const { chosen, request } = answering;
  const isInChunks = chosen.hasStructuredReplies && (request.flags & CommandFlag.Df) === 0;
  const end = request.offset + request.length;
  for (let at = request.offset; at < end; ) {
    const pieceEnd = Math.min(end, at - (at % EXPORT_BLOCK_BYTES) + PIECE_BYTES);
    const parts = isInChunks ? await readChunks(answering, at, pieceEnd) : await readWhole(answering, at, pieceEnd);
    if (!isInChunks) onBegun();
    await answering.send(parts);
    at = pieceEnd;
  }
}

/** One piece of a reply without chunks, or with a single one: the header comes before the first. */
async function readWhole(answering: Answering, start: number, end: number): Promise<Buffer[]> {
  const { chosen, request, buffer } = answering;
  await readInto(answering, start, { start, end });
  const payloadEnd = PAYLOAD_AT + end - start;
  if (start !== request.offset) return [buffer.subarray(PAYLOAD_AT, payloadEnd)];
  if (chosen.hasStructuredReplies) {
    return [buffer.subarray(putDataHeader(answering, PAYLOAD_AT, start, request.length, true), payloadEnd)];
  }
  const headerAt = PAYLOAD_AT - SIMPLE_REPLY_BYTES;
  putSimpleReply(buffer, headerAt, { error: 0, cookie: request.cookie });
  return [buffer.subarray(headerAt, payloadEnd)];
}

/** One piece of a reply in chunks: data and holes. */
async function readChunks(answering: Answering, start: number, end: number): Promise<Buffer[]> {
  const { chosen, request, buffer, signal } = answering;
  const runs = await mapExport(chosen.export, start, end - start, MAX_PIECE_RUNS, signal);
  const mapped = runs.at(-1)?.end ?? start;
  if (mapped < end) runs.push({ start: mapped, end, isZero: false });
  await readRuns(answering, start, runs);
  const isLastPiece = end === request.offset + request.length;
  return runs.map((run) => {
    const isDone = isLastPiece && run.end === end;
    if (run.isZero) return encodeHole(request.cookie, run, isDone);
    const at = PAYLOAD_AT + run.start - start;
    // Before it are the margin of the buffer or the place of a hole, which is not in use.
    const headerAt = putDataHeader(answering, at, run.start, run.end - run.start, isDone);
    return buffer.subarray(headerAt, at + run.end - run.start);
  });
}

/** Reads the data among `runs`. All reads have settled when this does: the buffer is free then. */
async function readRuns(answering: Answering, pieceStart: number, runs: readonly Run[]): Promise<void> {
  const data = runs.filter(({ isZero }) => !isZero);
  if (data.length <= 1) {
    if (data[0] !== undefined) await readInto(answering, pieceStart, data[0]);
    return;
  }
  const results = await Promise.allSettled(data.map((run) => readInto(answering, pieceStart, run)));
  const failed = results.find((result) => result.status === "rejected");
  if (failed !== undefined) throw failed.reason;
}

/** Reads a run to its place in the buffer, widened to whole blocks. */
function readInto(
  { chosen, buffer, signal }: Answering,
  pieceStart: number,
  run: { readonly start: number; readonly end: number },
): Promise<void> {
  const start = alignDown(run.start, EXPORT_BLOCK_BYTES);
  const end = alignUp(run.end, EXPORT_BLOCK_BYTES);
  const at = PAYLOAD_AT + start - pieceStart;
  return readExport(chosen.export, start, buffer.subarray(at, at + end - start), signal);
}

/** Puts the header of a data chunk before the data at `at`; returns where the header starts. */
function putDataHeader(
  { request, buffer }: Answering,
  at: number,
  offset: number,
  length: number,
  isDone: boolean,
): number {
  const headerAt = at - DATA_OFFSET_BYTES - CHUNK_HEADER_BYTES;
  putChunkHeader(buffer, headerAt, {
    flags: isDone ? ChunkFlag.Done : 0,
    type: ChunkType.OffsetData,
    cookie: request.cookie,
    payloadBytes: DATA_OFFSET_BYTES + length,
  });
  buffer.writeBigUInt64BE(BigInt(offset), at - DATA_OFFSET_BYTES);
  return headerAt;
}

function encodeHole(cookie: bigint, { start, end }: Run, isDone: boolean): Buffer {
  const bytes = Buffer.allocUnsafe(CHUNK_HEADER_BYTES + HOLE_CHUNK_BYTES);
  putChunkHeader(bytes, 0, {
    flags: isDone ? ChunkFlag.Done : 0,
    type: ChunkType.OffsetHole,
    cookie,
    payloadBytes: HOLE_CHUNK_BYTES,
  });
  bytes.writeBigUInt64BE(BigInt(start), CHUNK_HEADER_BYTES);
  bytes.writeUInt32BE(end - start, CHUNK_HEADER_BYTES + DATA_OFFSET_BYTES);
  return bytes;
}

/** Answers a BLOCK_STATUS with one chunk. @throws ExportFailure */
export async function answerBlockStatus({ chosen, request, buffer, send, signal }: Answering): Promise<void> {
  const isOne = (request.flags & CommandFlag.ReqOne) !== 0;
  // With two runs, the first one is known to be whole.
  const maxRuns = isOne ? 2 : MAX_STATUS_RUNS;
  const runs = (await mapExport(chosen.export, request.offset, request.length, maxRuns, signal)).slice(0, maxRuns);
  const told = isOne ? runs.slice(0, 1) : runs;
  let at = CHUNK_HEADER_BYTES;
  at = buffer.writeUInt32BE(ALLOCATION_CONTEXT_ID, at);
  for (const run of told) {
    at = buffer.writeUInt32BE(run.end - run.start, at);
    at = buffer.writeUInt32BE(run.isZero ? AllocationFlag.Hole | AllocationFlag.Zero : 0, at);
  }
  putChunkHeader(buffer, 0, {
    flags: ChunkFlag.Done,
    type: ChunkType.BlockStatus,
    cookie: request.cookie,
    payloadBytes: at - CHUNK_HEADER_BYTES,
  });
  await send([buffer.subarray(0, at)]);
}

/** The reply to a request that failed; `text` is for people, and only structured replies carry it. */
export function encodeFailure(hasStructuredReplies: boolean, cookie: bigint, error: number, text: string): Buffer {
  if (!hasStructuredReplies) return encodeSimpleReply({ error, cookie });
  const payload = encodeErrorPayload({ error, text: text.slice(0, MAX_QUOTED_TEXT), offset: undefined });
  const header = { flags: ChunkFlag.Done, type: ChunkType.Error, cookie, payloadBytes: payload.length };
  return Buffer.concat([encodeChunkHeader(header), payload]);
}
