// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { splitAt } from "../../../src/block/index.ts";

describe("splitAt()", () => {
  it("cuts at multiples of the unit, not at multiples of the first offset", () => {
    expect([...splitAt({ offset: 6, length: 10 }, 4)]).toEqual([
      { offset: 6, length: 2 },
      { offset: 8, length: 4 },
      { offset: 12, length: 4 },
    ]);
  });
});
