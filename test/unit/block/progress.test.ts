// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { type CopyCounters, ProgressReporter } from "../../../src/block/progress.ts";

const GIB = 2 ** 30;
const counters = (doneBytes: number): CopyCounters => ({
  totalBytes: 8 * GIB,
  doneBytes,
  readBytes: doneBytes / 2,
  writtenBytes: doneBytes / 4,
  zeroBytes: doneBytes / 2,
  sameBytes: 0,
});

describe("ProgressReporter", () => {
  it.each([
    ["a full copy", 8 * GIB, "8.0 GiB"],
    ["an incremental one", 32 * GIB, "8.0 GiB dirty"],
  ])("says percent, bytes, time, zeroes and both rates of %s", (_kind, deviceBytes, whole) => {
    const reporter = new ProgressReporter("drive-scsi0", deviceBytes, 0);
    expect(reporter.update(counters(2 * GIB), 4000)).toBe(
      `drive-scsi0:  25% (2.0 GiB of ${whole}) in 4.0s, read: 1.0 GiB, zero: 1.0 GiB, written: 512 MiB ` +
        "(read 256 MiB/s, write 128 MiB/s)",
    );
    expect(reporter.finish(counters(8 * GIB), 16_000)).toBe(
      `drive-scsi0: 100% of ${whole} in 16s, read: 4.0 GiB, zero: 4.0 GiB, written: 2.0 GiB ` +
        "(read 256 MiB/s, write 128 MiB/s)",
    );
  });

  it("speaks at most once a second, whatever the speed", () => {
    const reporter = new ProgressReporter("d", 8 * GIB, 0);
    const spoken: number[] = [];
    for (let ms = 0; ms < 60_000; ms += 10) {
      if (reporter.update(counters((8 * GIB * ms) / 60_000), ms) !== undefined) spoken.push(ms);
    }
    expect(spoken.length).toBeGreaterThan(5);
    for (const [i, ms] of spoken.entries()) if (i > 0) expect(ms - (spoken[i - 1] ?? 0)).toBeGreaterThanOrEqual(1000);
  });

  it("does not call 99.9 % done", () => {
    const reporter = new ProgressReporter("d", 8 * GIB, 0);
    expect(reporter.update(counters(8 * GIB - 1), 5000)).toContain(" 99% ");
  });

  it("says what the base has already, where there is some", () => {
    const same = { ...counters(8 * GIB), sameBytes: 3 * GIB };
    expect(new ProgressReporter("d", 8 * GIB, 0).finish(same, 1000)).toContain(
      "read: 4.0 GiB, zero: 4.0 GiB, unchanged: 3.0 GiB, written: 2.0 GiB",
    );
  });

  it("takes an empty map for done", () => {
    const nothing = { totalBytes: 0, doneBytes: 0, readBytes: 0, writtenBytes: 0, zeroBytes: 0, sameBytes: 0 };
    expect(new ProgressReporter("d", 8 * GIB, 0).finish(nothing, 1000)).toBe("d: nothing changed");
  });
});
