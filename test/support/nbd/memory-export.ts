// SPDX-License-Identifier: AGPL-3.0-or-later
import type { NbdExport, ZeroExtent } from "../../../src/nbd/index.ts";

interface Range {
  readonly offset: number;
  readonly length: number;
}

interface MemoryExportOptions {
  readonly name?: string;
  readonly description?: string;
  readonly bytes: Buffer;
  /** Ascending ranges that are reported as zeroes; what `bytes` has there is returned if it is read. */
  readonly zeroes?: readonly Range[];
  /** Runs before each read; a rejection fails it. */
  readonly onRead?: (range: Range, signal: AbortSignal) => Promise<void>;
}

/** An export in memory, which notes what it is asked. */
export class MemoryExport implements NbdExport {
  readonly name: string;
  readonly description: string;
  readonly bytes: Buffer;
  readonly reads: Range[] = [];
  readonly #zeroes: readonly Range[];
  readonly #onRead: MemoryExportOptions["onRead"];
  /** read() and extents() that have not settled. */
  pending = 0;

  constructor({ name = "disk", description = "a disk", bytes, zeroes = [], onRead }: MemoryExportOptions) {
    this.name = name;
    this.description = description;
    this.bytes = bytes;
    this.#zeroes = zeroes;
    this.#onRead = onRead;
  }

  get sizeBytes(): number {
    return this.bytes.length;
  }

  async read(offset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    const range = { offset, length: target.length };
    this.reads.push(range);
    this.pending++;
    try {
      await this.#onRead?.(range, signal);
      this.bytes.copy(target, 0, offset, offset + target.length);
    } finally {
      this.pending--;
    }
  }

  async extents(offset: number, length: number): Promise<ZeroExtent[]> {
    const list: ZeroExtent[] = [];
    const end = offset + length;
    let at = offset;
    for (const zero of this.#zeroes) {
      const zeroEnd = Math.min(zero.offset + zero.length, end);
      if (zeroEnd <= at) continue;
      if (zero.offset >= end) break;
      if (zero.offset > at) list.push({ length: zero.offset - at, isZero: false });
      at = Math.max(at, zero.offset);
      list.push({ length: zeroEnd - at, isZero: true });
      at = zeroEnd;
    }
    if (at < end) list.push({ length: end - at, isZero: false });
    return list;
  }
}
