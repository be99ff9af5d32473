// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { Pace } from "../../../src/archive/pacing.ts";

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
