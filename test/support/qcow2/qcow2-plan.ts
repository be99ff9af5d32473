// SPDX-License-Identifier: AGPL-3.0-or-later
// Random disks for property tests: what is written where, as a raw oracle and through our writer.
import fc from "fast-check";
import { AlignedPool } from "../../../src/block/index.ts";
import { type ClusterCompressor, type Compression, Qcow2Writer } from "../../../src/qcow2/index.ts";
import type { Qcow2Summary } from "../../../src/qcow2/writer.ts";
import { newFileAt } from "./open-images.ts";
import { KIB, MIB, randomBytes, textBytes } from "./qcow2-images.ts";

type Fill = "random" | "text" | "mixed" | "same";

/** One step through the disk, in clusters; "skip" leaves the data below as it is. */
interface Step {
  readonly kind: "data" | "zero" | "skip";
  readonly clusters: number;
  readonly fill: Fill;
  readonly seed: number;
}

export interface DiskPlan {
  readonly virtualBytes: number;
  readonly clusterBits: number;
  readonly compression: Compression;
  readonly steps: readonly Step[];
}

const step: fc.Arbitrary<Step> = fc.record({
  kind: fc.constantFrom("data", "data", "zero", "skip"),
  clusters: fc.oneof(
    fc.integer({ min: 1, max: 4 }),
    fc.integer({ min: 1, max: 40 }),
    fc.integer({ min: 1, max: 70_000 }),
  ),
  fill: fc.constantFrom("random", "text", "mixed", "same"),
  seed: fc.integer({ min: 1, max: 2 ** 20 }),
});

export const diskPlan: fc.Arbitrary<DiskPlan> = fc.record({
  virtualBytes: fc.constantFrom(
    0,
    512,
    64 * KIB - 512,
    64 * KIB,
    64 * KIB + 512,
    3.5 * MIB,
    17 * MIB + 1536,
    5000 * MIB,
  ),
  clusterBits: fc.constantFrom(9, 12, 16, 16),
  compression: fc.constantFrom("none", "zlib", "zstd"),
  steps: fc.array(step, { maxLength: 24 }),
});

/** The most data in one plan: there are many plans. */
const MAX_DATA_BYTES = 6 * MIB;

function fillBytes(fill: Fill, length: number, seed: number): Buffer {
  if (fill === "random") return randomBytes(length, seed);
  if (fill === "text") return textBytes(length, seed);
  if (fill === "same") return Buffer.alloc(length, 1 + (seed % 255));
  const bytes = textBytes(length, seed);
  for (let at = 0; at < length; at += 3 * 5000) randomBytes(5000, seed + at).copy(bytes, at);
  return bytes;
}

export interface PlannedPiece {
  readonly kind: "data" | "zero";
  readonly offset: number;
  readonly length: number;
  readonly bytes: Buffer;
}

/** Places the steps one after another until the disk ends. */
export function layOut(plan: DiskPlan): PlannedPiece[] {
  const clusterBytes = 2 ** plan.clusterBits;
  const pieces: PlannedPiece[] = [];
  let dataBytes = 0;
  let offset = 0;
  for (const { kind, clusters, fill, seed } of plan.steps) {
    const wanted = clusters * clusterBytes;
    const isData = kind === "data" && dataBytes + Math.min(wanted, 2 * MIB) <= MAX_DATA_BYTES;
    const length = Math.min(plan.virtualBytes - offset, isData ? Math.min(wanted, 2 * MIB) : wanted);
    if (length <= 0) break;
    if (isData) dataBytes += length;
    if (isData) pieces.push({ kind: "data", offset, length, bytes: fillBytes(fill, length, seed) });
    else if (kind === "zero") pieces.push({ kind: "zero", offset, length, bytes: Buffer.alloc(0) });
    offset += length;
  }
  return pieces;
}

/** Writes the pieces as a copy engine does: from slots of aligned memory, with several calls in flight. */
export async function writePlan(
  path: string,
  plan: DiskPlan,
  pieces: readonly PlannedPiece[],
  extra: { backing?: { file: string; format: "qcow2" }; compressor?: ClusterCompressor | undefined } = {},
): Promise<Qcow2Summary> {
  const { signal } = new AbortController();
  const { virtualBytes, clusterBits, compression } = plan;
  await using writer = await Qcow2Writer.create({
    file: newFileAt(path),
    virtualBytes,
    clusterBits,
    compression,
    signal,
    ...extra,
  });
  const pool = new AlignedPool(MIB, 4);
  const running: Array<Promise<void>> = [];
  for (const { kind, offset, length, bytes } of pieces) {
    if (kind === "zero") {
      running.push(writer.writeZero(offset, length));
      continue;
    }
    for (let at = 0; at < length; at += MIB) {
      const slot = await pool.acquire(signal);
      const part = slot.bytes.subarray(0, Math.min(MIB, length - at));
      bytes.copy(part, 0, at);
      running.push(
        writer.writeData(offset + at, part).then(() => {
          slot.bytes.fill(0xee); // a late reader of the slot now reads nonsense
          slot.release();
        }),
      );
    }
  }
  await Promise.all(running);
  return await writer.finish();
}
