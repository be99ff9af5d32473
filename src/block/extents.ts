// SPDX-License-Identifier: AGPL-3.0-or-later
// Ranges of a disk: half-open, in bytes, ascending. The seam between what is read and what is written.

/** Half-open range of a disk: [offset, offset + length), in bytes. */
export interface Extent {
  readonly offset: number;
  readonly length: number;
}

/** A range of a source and whether it is known to read as zeroes, so that nobody has to read it. */
export interface SourceExtent extends Extent {
  readonly zero: boolean;
}

export const endOf = (extent: Extent): number => extent.offset + extent.length;

/** The common part of two ranges, or undefined where they only touch or are apart. */
export function intersect(a: Extent, b: Extent): Extent | undefined {
  const offset = Math.max(a.offset, b.offset);
  const length = Math.min(endOf(a), endOf(b)) - offset;
  return length > 0 ? { offset, length } : undefined;
}

/** Joins neighbours that touch and are alike; `source` must be ascending. Holds one extent. */
export async function* coalesce(source: AsyncIterable<SourceExtent>): AsyncGenerator<SourceExtent, void, undefined> {
  let held: SourceExtent | undefined;
  for await (const next of source) {
    if (held !== undefined && held.zero === next.zero && endOf(held) === next.offset) {
      held = { offset: held.offset, length: held.length + next.length, zero: held.zero };
    } else {
      if (held !== undefined) yield held;
      held = next;
    }
  }
  if (held !== undefined) yield held;
}

/**
 * Cuts `extent` at every multiple of `unit`, so that no piece crosses one. The pieces of an
 * aligned extent are whole units; only the first and the last of an unaligned one are shorter.
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
