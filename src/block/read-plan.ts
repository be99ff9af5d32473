// SPDX-License-Identifier: AGPL-3.0-or-later
// Turns the extents that a source reports (dirty ranges, zero or data, any alignment) into the unit in
// which an image is written: whole clusters.
import { type Extent, endOf, type SourceExtent, splitAt } from "./extents.ts";

/**
 * One step of a copy, in guest order.
 * - `zero`: whole clusters that read as zeroes; they are not read.
 * - `data`: whole clusters (the last one of the disk may be short), all of which may be read.
 * - `partial`: one cluster of which only `extents` may be read from the source; the rest is unchanged
 *   since the base and must be completed from there.
 */
export type CopyStep =
  | (Extent & { readonly kind: "zero" | "data" })
  | (Extent & { readonly kind: "partial"; readonly extents: readonly SourceExtent[] });

interface ReadPlanOptions {
  readonly sizeBytes: number;
  readonly clusterBytes: number;
  /** Longest `data` step; a multiple of `clusterBytes`. */
  readonly maxReadBytes: number;
}

type ClusterRange = Extent & { readonly kind: "zero" | "data" };

/**
 * Plans a copy. `source` is ascending and does not overlap; what it leaves out is not read at all.
 * A cluster that is completely covered and only partly zero is read whole: fewer requests, same bytes.
 * Memory: the extents of one cluster.
 */
export async function* planCopy(
  source: AsyncIterable<SourceExtent>,
  options: ReadPlanOptions,
): AsyncGenerator<CopyStep, void, undefined> {
  let held: ClusterRange | undefined;
  for await (const range of alignToClusters(source, options)) {
    if (range.kind !== "partial" && held?.kind === range.kind && endOf(held) === range.offset) {
      held = { kind: held.kind, offset: held.offset, length: held.length + range.length };
      // A long run of data is passed on as it grows: the copy must not wait for its end.
      if (held.kind === "data" && held.length >= 2 * options.maxReadBytes) {
        const end = endOf(held) - (endOf(held) % options.maxReadBytes);
        yield* cut({ kind: "data", offset: held.offset, length: end - held.offset }, options);
        held = end < endOf(held) ? { kind: "data", offset: end, length: endOf(held) - end } : undefined;
      }
      continue;
    }
    if (held !== undefined) yield* cut(held, options);
    held = undefined;
    if (range.kind === "partial") yield range;
    else held = range;
  }
  if (held !== undefined) yield* cut(held, options);
}

function* cut(range: ClusterRange, { maxReadBytes }: ReadPlanOptions): Generator<CopyStep, void, undefined> {
  if (range.kind === "zero") {
    yield range;
    return;
  }
  for (const piece of splitAt(range, maxReadBytes)) yield { kind: "data", ...piece };
}

/** Splits the extents at cluster borders; gathers the pieces of a cluster that is partly covered. */
async function* alignToClusters(
  source: AsyncIterable<SourceExtent>,
  { sizeBytes, clusterBytes }: ReadPlanOptions,
): AsyncGenerator<CopyStep, void, undefined> {
  const clusterAt = (offset: number): Extent => {
    const start = offset - (offset % clusterBytes);
    return { offset: start, length: Math.min(clusterBytes, sizeBytes - start) };
  };
  let pieces: SourceExtent[] = [];
  for await (const extent of source) {
    let { offset } = extent;
    const end = endOf(extent);
    while (offset < end) {
      const cluster = clusterAt(offset);
      const open = pieces[0];
      if (open !== undefined && clusterAt(open.offset).offset !== cluster.offset) {
        yield finishCluster(clusterAt(open.offset), pieces);
        pieces = [];
      }
      const isWhole = pieces.length === 0 && offset === cluster.offset && end >= endOf(cluster);
      const next = isWhole ? lastWholeCluster(end, cluster, clusterBytes, sizeBytes) : Math.min(end, endOf(cluster));
      if (isWhole) yield { kind: extent.zero ? "zero" : "data", offset, length: next - offset };
      else pieces.push({ offset, length: next - offset, zero: extent.zero });
      offset = next;
    }
  }
  const open = pieces[0];
  if (open !== undefined) yield finishCluster(clusterAt(open.offset), pieces);
}

/** End of the last cluster that lies completely below `end`; a short last cluster of the disk counts. */
function lastWholeCluster(end: number, first: Extent, clusterBytes: number, sizeBytes: number): number {
  if (end >= sizeBytes) return sizeBytes;
  return Math.max(endOf(first), end - (end % clusterBytes));
}

function finishCluster(cluster: Extent, pieces: readonly SourceExtent[]): CopyStep {
  const covered = pieces.reduce((sum, piece) => sum + piece.length, 0);
  if (covered < cluster.length) return { kind: "partial", ...cluster, extents: pieces };
  return { kind: pieces.every((piece) => piece.zero) ? "zero" : "data", ...cluster };
}
