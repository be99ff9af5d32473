// SPDX-License-Identifier: AGPL-3.0-or-later
// The progress line that PVE's users know, at most one a second, every few seconds.
import { formatBytes } from "../core/index.ts";

/** The progress of a copy, in bytes. */
export interface CopyCounters {
  /** What the copy will process: the dirty ranges, or the whole disk. */
  totalBytes: number;
  /** Read, skipped as zero, or found to be zero. */
  doneBytes: number;
  readBytes: number;
  /** Bytes added to the archive: after zero detection and compression. */
  writtenBytes: number;
  zeroBytes: number;
  /** Read, and found to be what the base has. */
  sameBytes: number;
}

const FIRST_LINE_MS = 3_000;
const LINE_EVERY_MS = 10_000;
/** A new percentage is worth a line only if the last line is older than this. */
const NEWS_MS = 3_000;

/** Decides when a line is due and words it. The caller supplies the clock: milliseconds, monotonic. */
export class ProgressReporter {
  readonly #label: string;
  readonly #deviceBytes: number;
  readonly #startMs: number;
  #lastMs: number;
  #lastPercent = -1;
  #lastReadBytes = 0;
  #lastWrittenBytes = 0;

  /** @param deviceBytes size of the whole disk: a copy of less is a copy of what changed, and says so */
  constructor(label: string, deviceBytes: number, nowMs: number) {
    this.#label = label;
    this.#deviceBytes = deviceBytes;
    this.#startMs = nowMs;
    this.#lastMs = nowMs;
  }

  /** A line if one is due now, otherwise undefined. Never two within a second. */
  update(counters: CopyCounters, nowMs: number): string | undefined {
    const percent = percentOf(counters);
    const sinceMs = nowMs - this.#lastMs;
    const isFirst = this.#lastPercent < 0;
    const isDue = isFirst
      ? sinceMs >= FIRST_LINE_MS
      : sinceMs >= LINE_EVERY_MS || (sinceMs >= NEWS_MS && percent !== this.#lastPercent);
    if (!isDue) return undefined;
    const line =
      `${this.#label}: ${String(percent).padStart(3)}% ` +
      `(${formatBytes(counters.doneBytes)} of ${this.#whole(counters)}) ` +
      `in ${formatDuration(nowMs - this.#startMs)}, ${amounts(counters)} ` +
      `(read ${rate(counters.readBytes - this.#lastReadBytes, sinceMs)}, ` +
      `write ${rate(counters.writtenBytes - this.#lastWrittenBytes, sinceMs)})`;
    this.#lastMs = nowMs;
    this.#lastPercent = percent;
    this.#lastReadBytes = counters.readBytes;
    this.#lastWrittenBytes = counters.writtenBytes;
    return line;
  }

  /** The closing line, which is always printed, with the averages of the whole copy. */
  finish(counters: CopyCounters, nowMs: number): string {
    if (counters.totalBytes === 0) return `${this.#label}: nothing changed`;
    const ms = Math.max(1, nowMs - this.#startMs);
    return (
      `${this.#label}: 100% of ${this.#whole(counters)} in ${formatDuration(ms)}, ${amounts(counters)} ` +
      `(read ${rate(counters.readBytes, ms)}, write ${rate(counters.writtenBytes, ms)})`
    );
  }

  /** "8.0 GiB" of a full copy, "4.0 MiB dirty" of an incremental one. */
  #whole({ totalBytes }: CopyCounters): string {
    return totalBytes < this.#deviceBytes ? `${formatBytes(totalBytes)} dirty` : formatBytes(totalBytes);
  }
}

function amounts({ readBytes, zeroBytes, sameBytes, writtenBytes }: CopyCounters): string {
  const same = sameBytes === 0 ? "" : `unchanged: ${formatBytes(sameBytes)}, `;
  return `read: ${formatBytes(readBytes)}, zero: ${formatBytes(zeroBytes)}, ${same}written: ${formatBytes(writtenBytes)}`;
}

/** 100 only when everything is done: a copy at 99.9% is not finished. */
function percentOf({ doneBytes, totalBytes }: CopyCounters): number {
  return totalBytes === 0 ? 100 : Math.floor((doneBytes / totalBytes) * 100);
}

function rate(bytes: number, ms: number): string {
  return `${formatBytes(Math.max(0, (bytes / Math.max(1, ms)) * 1000))}/s`;
}

/** "0.4s", "42s", "3m 7s", "2h 5m 9s". */
export function formatDuration(ms: number): string {
  if (ms < 9950) return `${(ms / 1000).toFixed(1)}s`;
  const seconds = Math.round(ms / 1000);
  const parts: string[] = [];
  if (seconds >= 3600) parts.push(`${Math.floor(seconds / 3600)}h`);
  if (seconds >= 60) parts.push(`${Math.floor(seconds / 60) % 60}m`);
  parts.push(`${seconds % 60}s`);
  return parts.join(" ");
}
