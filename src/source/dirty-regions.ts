// SPDX-License-Identifier: AGPL-3.0-or-later
// The dirty regions that PVE reports for a file handle, and whether they can be trusted. PVE reads them from
// nbdinfo, and if nbdinfo fails it reports nothing: silence looks like "no changes".
import { type Extent, endOf } from "../block/index.ts";
import { RequestError } from "../core/index.ts";
import type { FileHandleCalls } from "../provider/index.ts";

/** Requested from the Perl side at a time: some hundred kilobytes of JSON. */
export const REGIONS_PER_BATCH = 8192;

const HINT = "vm-backup-mechanism nbd asks QEMU itself";

/**
 * The regions that PVE reports, batch by batch.
 *
 * @param timeoutMs how long each batch may take
 * @throws RequestError unless the regions are ascending, do not overlap, have a length, and lie inside the disk
 */
export async function* reportedRegions(
  device: string,
  sizeBytes: number,
  calls: FileHandleCalls,
  timeoutMs: number,
  signal: AbortSignal,
): AsyncGenerator<Extent, void, undefined> {
  let endOfLast = 0;
  for (let done = false; !done; ) {
    const batch = await calls.nextDirtyRegions(device, REGIONS_PER_BATCH, timeoutMs, signal);
    done = batch.done;
    if (!done && batch.regions.length === 0) throw refused(device, "PVE says that more of them follow, but not which");
    for (const region of batch.regions) {
      const { offset, length } = region;
      const is = `PVE reports ${length} bytes at ${offset}`;
      if (length <= 0) throw refused(device, is);
      if (offset < endOfLast) throw refused(device, `${is}, after a region that ends at ${endOfLast}`);
      if (length > sizeBytes - offset) throw refused(device, `${is} of a disk of ${sizeBytes}`);
      endOfLast = endOf(region);
      yield region;
    }
  }
}

/**
 * For a backup that starts a bitmap or does not use one: everything counts as dirty.
 *
 * @throws RequestError if the regions do not cover the whole disk
 */
export async function mustBeWhole(device: string, sizeBytes: number, regions: AsyncIterable<Extent>): Promise<void> {
  let end = 0;
  for await (const region of regions) {
    if (region.offset !== end) break;
    end = endOf(region);
  }
  if (end !== sizeBytes) {
    throw refused(device, `PVE reports them without gap to byte ${end} only, a full backup needs all ${sizeBytes}`);
  }
}

/**
 * For a backup that reuses a bitmap.
 *
 * @param bitmap the dirty ranges as QEMU itself reports them
 * @returns how many bytes are dirty
 * @throws RequestError at the first difference; missing regions count
 */
export async function mustMatchBitmap(
  device: string,
  regions: AsyncIterable<Extent>,
  bitmap: AsyncIterable<Extent>,
): Promise<number> {
  const [reported, actual] = [joined(regions), joined(bitmap)];
  let dirtyBytes = 0;
  for (;;) {
    const ours = (await actual.next()).value;
    const theirs = (await reported.next()).value;
    if (ours === undefined && theirs === undefined) return dirtyBytes;
    if (ours?.offset !== theirs?.offset || ours?.length !== theirs?.length) {
      throw refused(device, `PVE reports ${describe(theirs)}, QEMU's bitmap says ${describe(ours)}`);
    }
    dirtyBytes += ours?.length ?? 0;
  }
}

/** Joins neighbours: where a run of dirty bytes is cut has no meaning. */
async function* joined(ranges: AsyncIterable<Extent>): AsyncGenerator<Extent, undefined, undefined> {
  let held: Extent | undefined;
  for await (const range of ranges) {
    if (held !== undefined && endOf(held) === range.offset) {
      held = { offset: held.offset, length: held.length + range.length };
      continue;
    }
    if (held !== undefined) yield held;
    held = range;
  }
  if (held !== undefined) yield held;
  return undefined;
}

function describe(range: Extent | undefined): string {
  return range === undefined ? "nothing more" : `${range.length} bytes at ${range.offset}`;
}

function refused(device: string, state: string): RequestError {
  return new RequestError(`Cannot verify the dirty regions of "${device}": ${state}`, { hint: HINT });
}
