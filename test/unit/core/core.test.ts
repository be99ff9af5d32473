// SPDX-License-Identifier: AGPL-3.0-or-later
import { mkdirSync } from "node:fs";
import { describe, expect, it } from "vitest";
import {
  alignUp,
  CleanupStack,
  environmentError,
  errnoOf,
  formatBytes,
  messageOf,
  orderedMap,
  RequestError,
  toSafeNumber,
} from "../../../src/core/index.ts";

describe("environmentError()", () => {
  it("names the act, the path, the state and the errno", () => {
    let thrown: unknown;
    try {
      mkdirSync("/proc/nowhere");
    } catch (error) {
      thrown = environmentError("create the folder", "/proc/nowhere", error);
    }
    expect(messageOf(thrown)).toBe('Cannot create the folder "/proc/nowhere": no such file or directory (ENOENT)');
    expect(errnoOf(thrown)).toBe("ENOENT");
  });

  it("tells the first failure where giving something back failed too", () => {
    const full = Object.assign(new Error("ENOSPC: write"), { code: "ENOSPC", syscall: "write" });
    const both = Object.assign(new Error(""), { name: "SuppressedError", suppressed: full, error: new Error("close") });
    expect(messageOf(environmentError("write", "/x", both))).toBe(
      'Cannot write "/x": no space left on the device (ENOSPC)',
    );
    expect(errnoOf(both)).toBe("ENOSPC");
    const refused = new RequestError("Cannot do it");
    expect(environmentError("write", "/x", Object.assign(new Error(""), { suppressed: refused }))).toBe(refused);
  });

  it("passes an error of our own unchanged", () => {
    const inner = new RequestError("Cannot do it");
    expect(environmentError("read", "x", inner)).toBe(inner);
  });
});

describe("HostError", () => {
  it("folds its message into one line: the task log is line based", () => {
    expect(new RequestError("Cannot use\nthis\u0000name").message).toBe("Cannot use this name");
  });
});

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
