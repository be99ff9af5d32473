// SPDX-License-Identifier: AGPL-3.0-or-later
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it, onTestFinished, vi } from "vitest";
import { IdleWatch } from "../../../src/nbd/idle-watch.ts";

describe("IdleWatch.arm()", () => {
  it("calls once when nothing comes, and again when armed again", async () => {
    let calls = 0;
    const watch = new IdleWatch({ timeoutMs: 30, lastByteMs: () => 0, isWaiting: () => true, onIdle: () => calls++ });
    watch.arm();
    await sleep(150);
    expect(calls).toBe(1);
    watch.arm();
    await sleep(100);
    expect(calls).toBe(2);
  });
  it("goes to rest without looking again when nothing is expected any more", async () => {
    let questions = 0;
    const isWaiting = (): boolean => {
      questions++;
      return false;
    };
    const watch = new IdleWatch({ timeoutMs: 20, lastByteMs: () => 0, isWaiting, onIdle: () => expect.unreachable() });
    watch.arm();
    await sleep(150);
    expect(questions).toBe(1);
  });
  it("counts from the last byte", () => {
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "setImmediate", "performance"] });
    onTestFinished(() => void vi.useRealTimers());
    let calls = 0;
    const lastByteMs = performance.now() + 100;
    const watch = new IdleWatch({
      timeoutMs: 30,
      lastByteMs: () => lastByteMs,
      isWaiting: () => true,
      onIdle: () => calls++,
    });
    watch.arm();
    vi.advanceTimersByTime(129);
    expect(calls).toBe(0);
    vi.advanceTimersByTime(20);
    expect(calls).toBe(1);
  });
});

describe("IdleWatch.disarm()", () => {
  it("keeps it silent", async () => {
    const watch = new IdleWatch({
      timeoutMs: 20,
      lastByteMs: () => 0,
      isWaiting: () => true,
      onIdle: () => expect.unreachable(),
    });
    watch.arm();
    watch.disarm();
    await sleep(80);
  });
});
