// SPDX-License-Identifier: AGPL-3.0-or-later
// Sparse files as GNU tar stores them in the pax format, version 1.0: the member begins with a map of its
// data, then come the data without the holes. Sans I/O.
// Source: GNU tar manual, "Storing Sparse Files", PAX Format, Version 1.0.
import { ChildProcessError } from "../core/index.ts";

const BLOCK_BYTES = 512;
const MAX_MAP_BYTES = 64 * 1024 * 1024;
const NEWLINE = 0x0a;

export interface SparseExtent {
  readonly offset: number;
  readonly length: number;
}

/** Collects the map from the first bytes of a member. */
export class SparseMapReader {
  #bytes = Buffer.alloc(0);

  /**
   * @returns the extents and the data bytes that came with the last call, or undefined if more is needed
   * @throws ChildProcessError if the map is malformed, out of order, or beyond `fileBytes`
   */
  push(chunk: Uint8Array, fileBytes: number): { extents: SparseExtent[]; rest: Buffer } | undefined {
    this.#bytes = Buffer.concat([this.#bytes, chunk]);
    if (this.#bytes.byteLength > MAX_MAP_BYTES) throw malformed("its map is too long");
    const numbers: number[] = [];
    let at = 0;
    for (let wanted = 1; numbers.length < wanted; ) {
      const end = this.#bytes.indexOf(NEWLINE, at);
      if (end < 0) return undefined;
      const text = this.#bytes.toString("latin1", at, end);
      if (!/^\d{1,15}$/.test(text)) throw malformed("its map holds something other than a number");
      numbers.push(Number(text));
      at = end + 1;
      if (numbers.length === 1) wanted += 2 * (numbers[0] ?? 0);
      if (wanted > MAX_MAP_BYTES) throw malformed("its map is too long");
    }
    const dataAt = Math.ceil(at / BLOCK_BYTES) * BLOCK_BYTES;
    if (this.#bytes.byteLength < dataAt) return undefined;
    return { extents: toExtents(numbers.slice(1), fileBytes), rest: this.#bytes.subarray(dataAt) };
  }
}

function toExtents(numbers: readonly number[], fileBytes: number): SparseExtent[] {
  const extents: SparseExtent[] = [];
  let end = 0;
  for (let index = 0; index + 1 < numbers.length; index += 2) {
    const offset = numbers[index] ?? 0;
    const length = numbers[index + 1] ?? 0;
    if (offset < end || offset + length > fileBytes)
      throw malformed("its map is out of order or beyond the end of the file");
    end = offset + length;
    extents.push({ offset, length });
  }
  return extents;
}

function malformed(state: string): ChildProcessError {
  return new ChildProcessError(`Cannot read sparse file in archive: ${state}`);
}
