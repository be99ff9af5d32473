// SPDX-License-Identifier: AGPL-3.0-or-later
// What the server serves: an export, and the map of a range of it. Exports are ours, and still checked: a wrong
// extent would tell a client that data is a hole.

import { alignDown, alignUp } from "../core/index.ts";

/** Reads are widened to whole blocks of this, and sizes are multiples of it. */
export const EXPORT_BLOCK_BYTES = 512;
/** Questions for one map of a range: what lies behind the last answer is left out. */
const MAX_QUESTIONS = 256;

export interface ZeroExtent {
  /** In bytes. */
  readonly length: number;
  /** True if it reads as zeroes: reported as a hole, and not read. */
  readonly isZero: boolean;
}

/**
 * A read-only disk. The server asks many things at once, in any order. `signal` is one for everything that a client
 * asks, for as long as it is connected: listeners must be removed when a promise settles.
 */
export interface NbdExport {
  /** E.g. "drive-scsi0"; at most 4096 bytes of UTF-8. */
  readonly name: string;
  readonly description?: string;
  /** A multiple of 512. */
  readonly sizeBytes: number;
  /**
   * Fills `target` wholly with the bytes from `offset` on; both are multiples of 512. `target` is borrowed until the
   * promise settles. A rejection becomes EIO for the client that asked.
   */
  read(offset: number, target: Buffer, signal: AbortSignal): Promise<void>;
  /**
   * Extents from `offset` on: ascending, without gaps, and together at least one byte and at most `length`.
   * `offset` and `length` are multiples of 512.
   */
  extents(offset: number, length: number, signal: AbortSignal): Promise<readonly ZeroExtent[]>;
}

/** Half-open range of an export: [start, end), in bytes. */
export interface Run {
  readonly start: number;
  readonly end: number;
  readonly isZero: boolean;
}

/** A failure of an export, and the range it was asked for. */
export class ExportFailure extends Error {
  readonly offset: number;
  readonly length: number;

  constructor(cause: unknown, offset: number, length: number) {
    super("the export failed", { cause });
    this.offset = offset;
    this.length = length;
  }
}

/** Fills `target`. @throws ExportFailure */
export async function readExport(
  source: NbdExport,
  offset: number,
  target: Buffer,
  signal: AbortSignal,
): Promise<void> {
  try {
    await source.read(offset, target, signal);
  } catch (cause) {
    throw new ExportFailure(cause, offset, target.length);
  }
}

/**
 * The map of [offset, offset + length): runs that alternate, of which zero runs start and end on multiples of 512
 * unless the range does not. It covers the whole range, or a prefix with `maxRuns` runs or more.
 *
 * @throws ExportFailure
 */
export async function mapExport(
  source: NbdExport,
  offset: number,
  length: number,
  maxRuns: number,
  signal: AbortSignal,
): Promise<Run[]> {
  const list = new RunList(offset, offset + length);
  const end = alignUp(offset + length, EXPORT_BLOCK_BYTES);
  let at = alignDown(offset, EXPORT_BLOCK_BYTES);
  for (let questions = 0; at < end && list.runs.length < maxRuns && questions < MAX_QUESTIONS; questions++) {
    at = await ask(source, at, end, list, signal);
    // The next question starts on a block: what is left of a started one counts as data.
    const next = Math.min(alignUp(at, EXPORT_BLOCK_BYTES), end);
    if (next > at) list.add(at, next, false);
    at = next;
  }
  return list.runs;
}

/** One question; returns where the answer ends. */
async function ask(source: NbdExport, start: number, end: number, list: RunList, signal: AbortSignal): Promise<number> {
  let at = start;
  try {
    for (const { length, isZero } of await source.extents(start, end - start, signal)) {
      if (!(Number.isSafeInteger(length) && length > 0 && at + length <= end)) {
        throw new RangeError(`extent of ${length} bytes at ${at} does not fit into a range that ends at ${end}`);
      }
      list.add(at, at + length, isZero);
      at += length;
    }
    if (at === start) throw new RangeError(`there is no extent at ${start}`);
    return at;
  } catch (cause) {
    throw new ExportFailure(cause, start, end - start);
  }
}

/** Joins neighbours, shrinks zero runs to whole blocks and clips everything to a range. */
class RunList {
  readonly runs: Run[] = [];
  readonly #start: number;
  readonly #end: number;

  constructor(start: number, end: number) {
    this.#start = start;
    this.#end = end;
  }

  add(start: number, end: number, isZero: boolean): void {
    const zeroStart = alignUp(start, EXPORT_BLOCK_BYTES);
    const zeroEnd = alignDown(end, EXPORT_BLOCK_BYTES);
    if (!isZero || zeroStart >= zeroEnd) {
      this.#push(start, end, false);
      return;
    }
    this.#push(start, zeroStart, false);
    this.#push(zeroStart, zeroEnd, true);
    this.#push(zeroEnd, end, false);
  }

  #push(wholeStart: number, wholeEnd: number, isZero: boolean): void {
    const start = Math.max(wholeStart, this.#start);
    const end = Math.min(wholeEnd, this.#end);
    if (start >= end) return;
    const last = this.runs.at(-1);
    if (last?.isZero === isZero) this.runs[this.runs.length - 1] = { start: last.start, end, isZero };
    else this.runs.push({ start, end, isZero });
  }
}
