// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { orderedMap, RequestError } from "../../../src/core/index.ts";

describe("orderedMap()", () => {
  it("keeps the order and the limit", async () => {
    let running = 0;
    let most = 0;
    const results: number[] = [];
    const work = async (n: number): Promise<number> => {
      most = Math.max(most, ++running);
      await new Promise((resolve) => setTimeout(resolve, n % 3));
      running--;
      return n;
    };
    for await (const n of orderedMap(
      Array.from({ length: 40 }, (_, i) => i),
      4,
      work,
    ))
      results.push(n);
    expect(results).toEqual(Array.from({ length: 40 }, (_, i) => i));
    expect(most).toBe(4);
  });

  it("ends only when what is in flight has settled", async () => {
    let settled = 0;
    const work = async (n: number): Promise<void> => {
      if (n === 0) throw new RequestError("first");
      await new Promise((resolve) => setTimeout(resolve, 20));
      settled++;
    };
    const run = async (): Promise<void> => {
      for await (const _ of orderedMap([0, 1, 2, 3], 3, work)) void _;
    };
    await expect(run()).rejects.toThrow("first");
    expect(settled).toBe(2);
  });
});
