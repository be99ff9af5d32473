// SPDX-License-Identifier: AGPL-3.0-or-later
// Progress lines of an archive: its size in the end is not known, so files, bytes and rates.
import { readFileSync } from "node:fs";
import { formatDuration } from "../block/index.ts";
import { formatBytes } from "../core/index.ts";

interface ArchiveCounters {
  readonly files: number;
  readonly readBytes: number;
  readonly writtenBytes: number;
}

const FIRST_LINE_MS = 3_000;
const LINE_EVERY_MS = 10_000;

/** Decides when a line is due and words it. The clock comes from outside: milliseconds, monotonic. */
export class ArchiveProgress {
  readonly #startMs: number;
  #lastMs: number;
  #last: ArchiveCounters = { files: 0, readBytes: 0, writtenBytes: 0 };
  #isFirst = true;

  constructor(nowMs: number) {
    this.#startMs = nowMs;
    this.#lastMs = nowMs;
  }

  /** True if `update()` would answer a line now: gathering the counters costs system calls. */
  isDue(nowMs: number): boolean {
    return nowMs - this.#lastMs >= (this.#isFirst ? FIRST_LINE_MS : LINE_EVERY_MS);
  }

  /** A line if one is due now, else undefined. Never two within a second. */
  update(counters: ArchiveCounters, nowMs: number): string | undefined {
    if (!this.isDue(nowMs)) return undefined;
    const ms = nowMs - this.#lastMs;
    const line =
      `container: ${amounts(counters)} in ${formatDuration(nowMs - this.#startMs)} ` +
      `(read ${rate(counters.readBytes - this.#last.readBytes, ms)}, ` +
      `write ${rate(counters.writtenBytes - this.#last.writtenBytes, ms)}, ` +
      `${fileRate(counters.files - this.#last.files, ms)})`;
    this.#isFirst = false;
    this.#lastMs = nowMs;
    this.#last = counters;
    return line;
  }

  /** The closing line: always said, with the averages of the whole archive. */
  finish(counters: ArchiveCounters, nowMs: number): string {
    const ms = nowMs - this.#startMs;
    return (
      `container: ${amounts(counters)} in ${formatDuration(ms)} (read ${rate(counters.readBytes, ms)}, ` +
      `write ${rate(counters.writtenBytes, ms)}, ${fileRate(counters.files, ms)})`
    );
  }
}

function amounts({ files, readBytes, writtenBytes }: ArchiveCounters): string {
  return `${files} files, read: ${formatBytes(readBytes)}, written: ${formatBytes(writtenBytes)}`;
}

function rate(bytes: number, ms: number): string {
  return `${formatBytes(Math.max(0, (bytes / Math.max(1, ms)) * 1000))}/s`;
}

function fileRate(files: number, ms: number): string {
  return `${Math.round(Math.max(0, (files / Math.max(1, ms)) * 1000))} files/s`;
}

/**
 * Bytes the process has read so far, by the kernel's count; undefined when it is gone or not ours. At once:
 * pacing cannot wait for its turn in the event loop.
 */
export function readProcessBytes(pid: number): number | undefined {
  try {
    const value = /^rchar: (\d+)$/m.exec(readFileSync(`/proc/${pid}/io`, "utf8"))?.[1];
    return value === undefined ? undefined : Number(value);
  } catch {
    return undefined;
  }
}
