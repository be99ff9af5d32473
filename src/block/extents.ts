// SPDX-License-Identifier: AGPL-3.0-or-later
// Ranges of a disk: half-open, in bytes, ascending. The interface between reading and writing.

/** Half-open range of a disk: [offset, offset + length), in bytes. */
export interface Extent {
  readonly offset: number;
  readonly length: number;
}

/** A range of a source, and whether it is known to read as zeroes and so need not be read. */
export interface SourceExtent extends Extent {
  readonly zero: boolean;
}

export const endOf = (extent: Extent): number => extent.offset + extent.length;

/**
 * Cuts `extent` at every multiple of `unit`, so that no piece crosses one. The pieces of an
 * aligned extent are whole units; in an unaligned one only the first and the last are shorter.
 */
export function* splitAt(extent: Extent, unit: number): Generator<Extent, void, undefined> {
  let offset = extent.offset;
  const end = endOf(extent);
  while (offset < end) {
    const next = Math.min(end, offset - (offset % unit) + unit);
    yield { offset, length: next - offset };
    offset = next;
  }
}
