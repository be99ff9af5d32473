// SPDX-License-Identifier: AGPL-3.0-or-later
// A source and a target in memory that record what a copy does with them.

import {
  type CopyOptions,
  type CopySource,
  type CopyTarget,
  POOL_SLOTS,
  READ_BYTES,
} from "../../../src/block/copy-device.ts";
import { AlignedPool, type Extent, endOf, type SourceExtent, Throttle } from "../../../src/block/index.ts";
import type { LogLevel } from "../../../src/core/log.ts";

export const KIB = 1024;
export const MIB = 1024 * KIB;

export class FakeSource implements CopySource {
  readonly sizeBytes: number;
  canDiscard = true;
  readonly reads: Extent[] = [];
  readonly discards: Extent[] = [];
  inFlight = 0;
  mostInFlight = 0;
  readonly #extents: readonly SourceExtent[];

  constructor(sizeBytes: number, extents: readonly SourceExtent[] = [{ offset: 0, length: sizeBytes, zero: false }]) {
    this.sizeBytes = sizeBytes;
    this.#extents = extents;
  }

  async dirtyBytes(): Promise<number> {
    return this.#extents.reduce((sum, { length }) => sum + length, 0);
  }

  async *extents(): AsyncGenerator<SourceExtent> {
    yield* this.#extents;
  }

  async read(offset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    this.reads.push({ offset, length: target.length });
    this.mostInFlight = Math.max(this.mostInFlight, ++this.inFlight);
    try {
      await this.answer(offset, target, signal);
    } finally {
      this.inFlight--;
    }
  }

  /** What a read does; by default it fills the buffer with a byte that is never zero. */
  answer: (offset: number, target: Buffer, signal: AbortSignal) => Promise<void> = async (_offset, target) => {
    await new Promise((resolve) => setImmediate(resolve));
    target.fill(0xd5);
  };

  async discard(range: Extent, signal: AbortSignal): Promise<void> {
    this.discards.push(range);
    await this.onDiscard(range, signal);
  }

  onDiscard: (range: Extent, signal: AbortSignal) => Promise<void> = async () => undefined;

  covers({ offset, length }: Extent): boolean {
    let at = offset;
    for (const extent of this.#extents) if (extent.offset <= at && at < endOf(extent)) at = endOf(extent);
    return at >= offset + length;
  }
}

class FakeTarget implements CopyTarget {
  readonly written: Array<Extent & { readonly kind: "data" | "zero"; readonly first: number | undefined }> = [];
  fileBytes = 0;
  /** How far the disk is behind what was handed in, in guest bytes. */
  lagBytes = 0;
  #handedIn = 0;

  get writtenWatermark(): number {
    return Math.max(0, this.#handedIn - this.lagBytes);
  }

  async writeData(guestOffset: number, bytes: Buffer): Promise<void> {
    this.written.push({ kind: "data", offset: guestOffset, length: bytes.length, first: bytes[0] });
    await this.onWrite(guestOffset);
    this.fileBytes += bytes.length;
    this.#handedIn = Math.max(this.#handedIn, guestOffset + bytes.length);
  }

  async writeZero(guestOffset: number, length: number): Promise<void> {
    this.written.push({ kind: "zero", offset: guestOffset, length, first: undefined });
    this.#handedIn = Math.max(this.#handedIn, guestOffset + length);
  }

  onWrite: (guestOffset: number) => Promise<void> = async () => undefined;
}

interface FakeCopy extends CopyOptions {
  readonly source: FakeSource;
  readonly target: FakeTarget;
  readonly lines: Array<{ readonly level: LogLevel; readonly message: string; readonly ms: number }>;
}

/** Options of a copy between fakes; `lines` is what was logged, and when. */
export function fakeCopy(source: FakeSource, change: Partial<CopyOptions> = {}): FakeCopy {
  const lines: FakeCopy["lines"] = [];
  return {
    device: "drive-scsi0",
    base: undefined,
    pool: new AlignedPool(READ_BYTES, POOL_SLOTS),
    throttle: new Throttle(0),
    signal: new AbortController().signal,
    ...change,
    source,
    target: new FakeTarget(),
    log: (level, message) => void lines.push({ level, message, ms: performance.now() }),
    lines,
  };
}

/** How many buffers of the pool can be had at once, without waiting. */
export async function freeSlots(pool: AlignedPool): Promise<number> {
  const giveUp = new AbortController();
  const wanted = Array.from({ length: POOL_SLOTS }, () => pool.acquire(giveUp.signal));
  await new Promise((resolve) => setImmediate(resolve));
  giveUp.abort(new Error("no more"));
  const settled = await Promise.allSettled(wanted);
  const held = settled.filter((result) => result.status === "fulfilled");
  for (const { value } of held) value.release();
  return held.length;
}
