// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { alignUp, formatBytes, toSafeNumber } from "../../../src/core/index.ts";

describe("bytes", () => {
  it("refuses a u64 that a number cannot hold", () => {
    expect(toSafeNumber(2n ** 53n - 1n, "x")).toBe(2 ** 53 - 1);
    expect(() => toSafeNumber(2n ** 53n, "L1 offset")).toThrow(/L1 offset 9007199254740992/);
  });

  it("aligns beyond 32 bits", () => {
    expect(alignUp(2 ** 44 + 1, 65536)).toBe(2 ** 44 + 65536);
  });

  it("formats sizes as PVE does", () => {
    expect([0, 1023, 1536, 5 * 2 ** 30, 300 * 2 ** 20].map(formatBytes)).toEqual([
      "0 B",
      "1023 B",
      "1.5 KiB",
      "5.0 GiB",
      "300 MiB",
    ]);
  });
});
