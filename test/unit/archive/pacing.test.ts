// SPDX-License-Identifier: AGPL-3.0-or-later

import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { Pace, pace } from "../../../src/archive/pacing.ts";
import type { ChildProcess } from "../../../src/host/index.ts";

const KIB = 1024;
const MIB = 1024 * KIB;

/** A machine with one program that reads, and a clock that moves with what is done. */
const machine = vi.hoisted(() => ({ nowMs: 0, bytesPerMs: 0, readBytes: 0, isStopped: false, look: async () => {} }));

/** The program begins to read before its share is so large that it may run unwatched: up to a late look then. */
const START_MS = 30;
/** What a look at the clock or at the program costs. */
const GLANCE_MS = 0.01;

function pass(ms: number): void {
  machine.nowMs += ms;
  if (!machine.isStopped && machine.nowMs > START_MS) machine.readBytes += ms * machine.bytesPerMs;
}

vi.mock("../../../src/archive/progress.ts", () => ({
  readProcessBytes: () => {
    pass(GLANCE_MS);
    return machine.readBytes;
  },
}));
vi.mock("../../../src/archive/timer.ts", () => ({
  startTimer: (_everyMs: number, look: () => Promise<void>) => {
    machine.look = look;
    return { [Symbol.asyncDispose]: async () => undefined };
  },
}));

describe("Pace", () => {
  it("stops a process that has read more than its share, until the share has caught up", () => {
    const pace = new Pace(1000, 0); // one byte per millisecond
    expect(pace.mustStop(0, 0)).toBe(false);
    expect(pace.mustStop(500, 10)).toBe(true);
    expect(pace.mustStop(500, 490)).toBe(true);
    expect(pace.mustStop(500, 500)).toBe(false);
  });

  it("keeps the average over a long run of bursts", () => {
    const pace = new Pace(1000, 0);
    let readBytes = 0;
    for (let nowMs = 0; nowMs < 60_000; nowMs += 4) if (!pace.mustStop(readBytes, nowMs)) readBytes += 777;
    expect(readBytes / 60).toBeGreaterThan(980);
    expect(readBytes / 60).toBeLessThan(1020);
  });

  it("does not let a process make up for a long pause", () => {
    const pace = new Pace(1000, 0);
    expect(pace.mustStop(0, 10_000)).toBe(false);
    expect(pace.mustStop(150, 10_000)).toBe(true);
    expect(pace.mustStop(150, 10_050)).toBe(false);
  });
});

describe("pace()", () => {
  const LIMIT = 10 * MIB;
  const tool = {
    pid: 1,
    hasExited: false,
    send: (signal: string) => {
      machine.isStopped = signal === "SIGSTOP";
    },
  } as unknown as ChildProcess;

  beforeEach(() => {
    Object.assign(machine, { nowMs: 0, readBytes: 0, isStopped: false });
    vi.spyOn(performance, "now").mockImplementation(() => {
      pass(GLANCE_MS);
      return machine.nowMs;
    });
  });
  afterEach(() => {
    vi.restoreAllMocks();
  });

  /** A minute of the program. @returns the most bytes by which it was ever ahead of the limit */
  async function runForAMinute(bytesPerMs: number, lookAfterMs: (look: number) => number): Promise<number> {
    machine.bytesPerMs = bytesPerMs;
    await using _pacing = pace(tool, LIMIT);
    let mostAhead = 0;
    for (let look = 0; machine.nowMs < 60_000; look++) {
      pass(lookAfterMs(look));
      await machine.look();
      mostAhead = Math.max(mostAhead, machine.readBytes - (machine.nowMs / 1000) * LIMIT);
    }
    return mostAhead;
  }

  const FAST = MIB;

  it("holds a fast reader to the limit, neither above nor below", async () => {
    expect(await runForAMinute(FAST, () => 4)).toBeLessThan(64 * KIB);
    expect(machine.readBytes / 60).toBeGreaterThan(0.98 * LIMIT);
  });

  it("holds it below the limit also where the looks come late, as on a busy machine", async () => {
    expect(await runForAMinute(FAST, (look) => (look % 5 === 4 ? 150 : 4))).toBeLessThan(64 * KIB);
  });

  it("does not slow a reader that stays below the limit", async () => {
    await runForAMinute(4 * KIB, () => 4);
    expect(machine.readBytes).toBeGreaterThan(0.98 * 4 * KIB * 60_000);
  });

  it("lets the program run on when it is disposed", async () => {
    await runForAMinute(FAST, () => 4);
    expect(machine.isStopped).toBe(false);
  });
});
