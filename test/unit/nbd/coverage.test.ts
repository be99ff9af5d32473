// SPDX-License-Identifier: AGPL-3.0-or-later
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Coverage } from "../../../src/nbd/coverage.ts";

describe("Coverage.add()", () => {
  it("takes pieces in any order and counts them", () => {
    const coverage = new Coverage();
    expect([coverage.add(10, 20), coverage.add(0, 5), coverage.add(5, 10)]).toEqual([true, true, true]);
    expect(coverage.coveredBytes).toBe(20);
  });
  it.each([
    [10, 20],
    [0, 11],
    [19, 30],
    [12, 13],
    [5, 25],
  ])("refuses [%d, %d), which repeats bytes of [10, 20)", (start, end) => {
    const coverage = new Coverage();
    coverage.add(10, 20);
    expect(coverage.add(start, end)).toBe(false);
  });
  it("refuses more than 8192 separate pieces", () => {
    const coverage = new Coverage();
    for (let piece = 0; piece < 8192; piece++) expect(coverage.add(2 * piece, 2 * piece + 1)).toBe(true);
    expect(coverage.add(200_000, 200_001)).toBe(false);
  });
  it("agrees with a set of byte numbers for random pieces", () => {
    const piece = fc.tuple(fc.nat(60), fc.integer({ min: 1, max: 8 }));
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 25 }), (pieces) => {
        const coverage = new Coverage();
        const seen = new Set<number>();
        for (const [start, length] of pieces) {
          const numbers = Array.from({ length }, (_, index) => start + index);
          const isNew = numbers.every((number) => !seen.has(number));
          expect(coverage.add(start, start + length)).toBe(isNew);
          if (isNew) for (const number of numbers) seen.add(number);
          expect(coverage.coveredBytes).toBe(seen.size);
        }
      }),
      { seed: 11, numRuns: 500 },
    );
  });
});
