// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { ArchiveProgress } from "../../../src/archive/progress.ts";

const MIB = 1024 * 1024;

describe("ArchiveProgress", () => {
  it("says a line after three seconds and then every ten, with the rates since the last", () => {
    const progress = new ArchiveProgress(1_000);
    const lines: string[] = [];
    for (let seconds = 1; seconds <= 30; seconds++) {
      const counters = { files: seconds * 100, readBytes: seconds * 10 * MIB, writtenBytes: seconds * MIB };
      const line = progress.update(counters, 1_000 + seconds * 1_000);
      if (line !== undefined) lines.push(line);
    }
    expect(lines).toEqual([
      "container: 300 files, read: 30.0 MiB, written: 3.0 MiB in 3.0s (read 10.0 MiB/s, write 1.0 MiB/s, 100 files/s)",
      "container: 1300 files, read: 130 MiB, written: 13.0 MiB in 13s (read 10.0 MiB/s, write 1.0 MiB/s, 100 files/s)",
      "container: 2300 files, read: 230 MiB, written: 23.0 MiB in 23s (read 10.0 MiB/s, write 1.0 MiB/s, 100 files/s)",
    ]);
  });
});
