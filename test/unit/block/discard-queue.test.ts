// SPDX-License-Identifier: AGPL-3.0-or-later
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { DiscardQueue } from "../../../src/block/discard-queue.ts";
import { type Extent, endOf } from "../../../src/block/extents.ts";

const MIB = 2 ** 20;
const never = new AbortController().signal;

function queueInto(discarded: Extent[]): DiscardQueue {
  const source = { canDiscard: true, discard: async (range: Extent) => void discarded.push(range) };
  return new DiscardQueue({ device: "d", source, log: () => undefined }, never);
}

/** Steps of 1 MiB in guest order: whether it is written, and how far the target has got by then, in MiB. */
const steps = fc.array(fc.tuple(fc.boolean(), fc.double({ min: 0, max: 1, noNaN: true })), { maxLength: 300 });

describe("DiscardQueue", () => {
  it("never discards what the target has not written, discards nothing twice, and keeps little back", async () => {
    await fc.assert(
      fc.asyncProperty(steps, async (all) => {
        const discarded: Extent[] = [];
        const queue = queueInto(discarded);
        const written: Extent[] = [];
        let watermark = 0;
        for (const [index, [isWritten, progress]] of all.entries()) {
          const range = { offset: index * MIB, length: MIB };
          queue.add([range]);
          if (isWritten) {
            queue.hold(range);
            written.push(range);
          }
          const before = discarded.length;
          watermark = Math.max(watermark, Math.floor(progress * (index + 1)) * MIB);
          await queue.advance(watermark);
          for (const one of discarded.slice(before)) {
            for (const held of written) {
              const overlap = Math.min(endOf(held), endOf(one)) - Math.max(held.offset, one.offset);
              if (overlap > 0) expect(Math.min(endOf(held), endOf(one))).toBeLessThanOrEqual(watermark);
            }
          }
        }
        const sorted = [...discarded].sort((a, b) => a.offset - b.offset);
        for (const [index, one] of sorted.entries()) {
          const next = sorted[index + 1];
          if (next !== undefined) expect(endOf(one)).toBeLessThanOrEqual(next.offset);
        }
      }),
      { numRuns: 500 },
    );
  });

  it("does not wait for a small write with what lies behind it and is not written", async () => {
    const discarded: Extent[] = [];
    const queue = queueInto(discarded);
    queue.add([{ offset: 0, length: 65536 }]);
    queue.hold({ offset: 0, length: 65536 });
    queue.add([{ offset: 65536, length: 40 * MIB }]);
    await queue.advance(0); // the write is still in a buffer
    expect(discarded).toEqual([{ offset: 65536, length: 40 * MIB }]);
  });
});
