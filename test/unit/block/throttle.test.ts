// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { Throttle } from "../../../src/block/index.ts";
import { CancelledError } from "../../../src/core/index.ts";

const signal = new AbortController().signal;

describe("Throttle", () => {
  it("keeps the average within 5 % of the limit", async () => {
    const throttle = new Throttle(1_000_000);
    const startMs = performance.now();
    for (let i = 0; i < 60; i++) await throttle.pass(50_000, signal);
    const seconds = (performance.now() - startMs) / 1000;
    // The last piece may still be under way at the limit: 59 intervals have passed, less 100 ms of credit.
    expect(3_000_000 / (seconds + 0.05)).toBeLessThan(1_050_000);
    expect(seconds).toBeGreaterThan(2.8);
  });

  it("does not wait without a limit", async () => {
    const throttle = new Throttle(0);
    const startMs = performance.now();
    for (let i = 0; i < 1000; i++) await throttle.pass(1e12, signal);
    expect(performance.now() - startMs).toBeLessThan(10_000);
  });

  it("rejects with the reason of the abort, at once", async () => {
    const throttle = new Throttle(1);
    const controller = new AbortController();
    await throttle.pass(1000, controller.signal);
    const waiting = throttle.pass(1000, controller.signal);
    const reason = new CancelledError("Cancelled by the test");
    controller.abort(reason);
    await expect(waiting).rejects.toBe(reason);
  });
});
