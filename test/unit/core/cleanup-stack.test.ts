// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { CleanupStack, RequestError } from "../../../src/core/index.ts";

describe("CleanupStack", () => {
  it("runs everything in reverse order, once, and throws the first failure", async () => {
    const order: number[] = [];
    const stack = new CleanupStack();
    stack.defer(() => void order.push(1));
    stack.defer(() => {
      order.push(2);
      throw new RequestError("two");
    });
    stack.defer(() => {
      order.push(3);
      throw new RequestError("three");
    });
    await expect(stack[Symbol.asyncDispose]()).rejects.toThrow("three");
    expect(order).toEqual([3, 2, 1]);
    await stack[Symbol.asyncDispose]();
    expect(order).toEqual([3, 2, 1]);
  });

  it("releases nothing after move()", async () => {
    let released = 0;
    const stack = new CleanupStack();
    stack.defer(() => void released++);
    const owner = stack.move();
    await stack[Symbol.asyncDispose]();
    expect(released).toBe(0);
    await owner[Symbol.asyncDispose]();
    expect(released).toBe(1);
  });
});
