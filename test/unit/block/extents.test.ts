// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { coalesce, intersect, type SourceExtent, splitAt } from "../../../src/block/index.ts";

async function* from(extents: SourceExtent[]): AsyncGenerator<SourceExtent> {
  yield* extents;
}

describe("intersect()", () => {
  it("gives the common part", () => {
    expect(intersect({ offset: 0, length: 10 }, { offset: 4, length: 10 })).toEqual({ offset: 4, length: 6 });
  });

  it("gives nothing for ranges that only touch", () => {
    expect(intersect({ offset: 0, length: 4 }, { offset: 4, length: 4 })).toBeUndefined();
  });
});

describe("coalesce()", () => {
  it("joins what touches and is alike, and nothing else", async () => {
    const joined: SourceExtent[] = [];
    const source = from([
      { offset: 0, length: 4, zero: false },
      { offset: 4, length: 4, zero: false },
      { offset: 8, length: 4, zero: true },
      { offset: 16, length: 4, zero: true },
    ]);
    for await (const extent of coalesce(source)) joined.push(extent);
    expect(joined).toEqual([
      { offset: 0, length: 8, zero: false },
      { offset: 8, length: 4, zero: true },
      { offset: 16, length: 4, zero: true },
    ]);
  });
});

describe("splitAt()", () => {
  it("cuts at multiples of the unit, not at multiples of the first offset", () => {
    expect([...splitAt({ offset: 6, length: 10 }, 4)]).toEqual([
      { offset: 6, length: 2 },
      { offset: 8, length: 4 },
      { offset: 12, length: 4 },
    ]);
  });
});
