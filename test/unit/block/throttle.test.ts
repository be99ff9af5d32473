// SPDX-License-Identifier: AGPL-3.0-or-later
import { afterEach, describe, expect, it, vi } from "vitest";
import { Throttle } from "../../../src/block/index.ts";
import { CancelledError } from "../../../src/core/index.ts";

const signal = new AbortController().signal;

/** A clock that only waiting moves; undefined: the real one. */
const clock = vi.hoisted(() => ({ nowMs: undefined as number | undefined }));

vi.mock("node:timers/promises", async (importOriginal) => {
  const real = await importOriginal<typeof import("node:timers/promises")>();
  const setTimeout: typeof real.setTimeout = async (ms, value, options) => {
    if (clock.nowMs === undefined) return await real.setTimeout(ms, value, options);
    clock.nowMs += ms ?? 0;
    return value as never;
  };
  return { ...real, setTimeout };
});

afterEach(() => {
  clock.nowMs = undefined;
  vi.restoreAllMocks();
});

/** Seconds that it takes to get so many pieces through. */
async function secondsFor(throttle: Throttle, pieces: number, pieceBytes: number): Promise<number> {
  const startMs = performance.now();
  for (let piece = 0; piece < pieces; piece++) await throttle.pass(pieceBytes, signal);
  return (performance.now() - startMs) / 1000;
}

function stopClock(): void {
  clock.nowMs = 1_000;
  vi.spyOn(performance, "now").mockImplementation(() => clock.nowMs ?? 0);
}

describe("Throttle", () => {
  it("keeps the average at the limit, neither above nor below", async () => {
    stopClock();
    const seconds = await secondsFor(new Throttle(1_000_000), 600, 50_000);
    // The last piece is still under way, and it begins with 100 ms of credit.
    expect(seconds).toBeCloseTo(30 - 0.05 - 0.1, 6);
  });

  it("does not let a copy make up for a long stall", async () => {
    stopClock();
    const throttle = new Throttle(1_000_000);
    await throttle.pass(1, signal);
    clock.nowMs = 60_000;
    expect(await secondsFor(throttle, 21, 50_000)).toBeCloseTo(1 - 0.1, 6);
  });

  it("does not wait without a limit: not even for the next turn of the event loop", async () => {
    let turns = 0;
    const turn = setImmediate(() => turns++);
    await secondsFor(new Throttle(0), 1000, 1e12);
    expect(turns).toBe(0);
    clearImmediate(turn);
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
