// SPDX-License-Identifier: AGPL-3.0-or-later
// What of the bytes that a copy has read goes into the image.
import type { Extent } from "./extents.ts";
import { zeroRuns } from "./zero.ts";

export const CLUSTER_BYTES = 64 * 1024;

/** A run of whole clusters, in guest order; the last one of the disk may be short. */
export interface CopyPiece extends Extent {
  /** `same`: the base reads the same here, so the image leaves it out. */
  readonly kind: "data" | "zero" | "same";
  /** Of data, where they were taken: one digest after the other. */
  readonly digests?: Buffer;
}

/** Decides what is written. PlainContent knows nothing of the base; src/directory compares with its digests. */
export interface CopyContent {
  /**
   * Splits a step of a copy into pieces, in guest order and without gaps.
   *
   * @param bytes of the whole step, borrowed until the promise settles; undefined: they are zeroes, and were not read
   */
  split(step: Extent, bytes: Buffer | undefined): Promise<readonly CopyPiece[]>;
  /** Called for each piece that is written, in guest order. */
  record(piece: CopyPiece): Promise<void>;
}

/** Everything is written, zeroes as such. */
export class PlainContent implements CopyContent {
  async split(step: Extent, bytes: Buffer | undefined): Promise<readonly CopyPiece[]> {
    if (bytes === undefined) return [{ offset: step.offset, length: step.length, kind: "zero" }];
    return [...zeroRuns(bytes, CLUSTER_BYTES)].map(({ offset, length, zero }) => ({
      offset: step.offset + offset,
      length,
      kind: zero ? "zero" : "data",
    }));
  }

  async record(): Promise<void> {
    // Nobody asks for it later.
  }
}
