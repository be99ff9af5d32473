// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { isZero, zeroRuns } from "../../../src/block/zero.ts";

describe("isZero()", () => {
  it("sees a single set bit at every place of a long buffer", () => {
    for (const at of [0, 1, 65535, 65536, 65537, 199_999]) {
      const bytes = Buffer.alloc(200_000);
      expect(isZero(bytes)).toBe(true);
      bytes[at] = 0x80;
      expect(isZero(bytes)).toBe(false);
    }
  });

  it("takes an empty buffer for zero", () => {
    expect(isZero(Buffer.alloc(0))).toBe(true);
  });
});

describe("zeroRuns()", () => {
  it("joins equal neighbours and keeps a short last piece", () => {
    const bytes = Buffer.alloc(10);
    bytes[5] = 1;
    expect([...zeroRuns(bytes, 4)]).toEqual([
      { offset: 0, length: 4, zero: true },
      { offset: 4, length: 4, zero: false },
      { offset: 8, length: 2, zero: true },
    ]);
  });

  it("yields one run for a buffer of one kind", () => {
    expect([...zeroRuns(Buffer.alloc(12, 7), 4)]).toEqual([{ offset: 0, length: 12, zero: false }]);
  });
});
