// SPDX-License-Identifier: AGPL-3.0-or-later
// How one call becomes several requests, and how their answers are put together again.

import { RequestError } from "../core/index.ts";
import type { BlockSize } from "./option-wire.ts";
import type { BlockStatusExtent } from "./wire.ts";

/**
 * Checks the range that a caller asks for.
 *
 * @param limits without `blockSize`, alignment is not checked
 * @throws RequestError if the range is not inside the export, or not aligned to the server's block
 *   size; the end of the export counts as aligned
 */
export function checkRange(
  act: string,
  { offset, length }: { readonly offset: number; readonly length: number },
  limits: { readonly sizeBytes: number; readonly blockSize?: BlockSize },
): void {
  const isRange = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
  if (!isRange || offset + length > limits.sizeBytes) {
    throw new RequestError(`Cannot ${act} ${length} bytes at ${offset}: the NBD export has ${limits.sizeBytes} bytes`);
  }
  const minimum = limits.blockSize?.minimum ?? 1;
  const isEndAligned = length % minimum === 0 || offset + length === limits.sizeBytes;
  if (offset % minimum !== 0 || !isEndAligned) {
    throw new RequestError(`Cannot ${act} ${length} bytes at ${offset}: the NBD server wants multiples of ${minimum}`);
  }
}

/** The pieces of a range, each no longer than `maximum`; an empty range has no pieces. */
export function cut(offset: number, length: number, maximum: number): Array<{ offset: number; length: number }> {
  const parts: Array<{ offset: number; length: number }> = [];
  for (let done = 0; done < length; done += maximum) {
    parts.push({ offset: offset + done, length: Math.min(maximum, length - done) });
  }
  return parts;
}

/** Throws the first failure, but only once all have settled: until then buffers are in use. */
export async function allSettled(parts: ReadonlyArray<Promise<unknown>>): Promise<void> {
  for (const result of await Promise.allSettled(parts)) {
    if (result.status === "rejected") throw result.reason;
  }
}

/** The parts of ascending extents that lie in [start, end); the list itself if all of it does. */
export function clip(extents: readonly BlockStatusExtent[], start: number, end: number): readonly BlockStatusExtent[] {
  const first = extents[0];
  const last = extents[extents.length - 1];
  if (first === undefined || last === undefined) return extents;
  if (first.offset >= start && last.offset + last.length <= end) return extents;
  return extents.flatMap(({ offset, length, flags }) => {
    const from = Math.max(offset, start);
    const to = Math.min(offset + length, end);
    return to > from ? [{ offset: from, length: to - from, flags }] : [];
  });
}
