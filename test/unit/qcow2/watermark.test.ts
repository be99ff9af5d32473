// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { Watermark } from "../../../src/qcow2/watermark.ts";

const STEP = 65536;

describe("Watermark", () => {
  it("follows the file, never ahead of it", () => {
    const mark = new Watermark();
    mark.add(100, 1 * STEP);
    mark.add(200, 2 * STEP);
    mark.add(300, 3 * STEP);
    expect(mark.guestEnd(STEP - 1)).toBe(0);
    expect(mark.guestEnd(STEP)).toBe(100);
    expect(mark.guestEnd(3 * STEP - 1)).toBe(200);
    expect(mark.guestEnd(9 * STEP)).toBe(300);
  });

  it("waits for the last of the steps that it joins", () => {
    const mark = new Watermark();
    mark.add(100, STEP + 1);
    mark.add(200, STEP + 9);
    expect(mark.guestEnd(STEP + 8)).toBe(0);
    expect(mark.guestEnd(STEP + 9)).toBe(200);
  });

  it("passes zeroes on at once when all data before is written", () => {
    const mark = new Watermark();
    mark.add(100, STEP);
    expect(mark.guestEnd(STEP)).toBe(100);
    mark.add(5000, STEP);
    expect(mark.guestEnd(STEP)).toBe(5000);
  });
});
