// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { TarMessages } from "../../../src/archive/tar-messages.ts";

function recorder(): { lines: string[]; log: (level: string, message: string) => void } {
  const lines: string[] = [];
  return { lines, log: (level, message) => void lines.push(`${level} ${message}`) };
}

describe("TarMessages", () => {
  it("sorts totals, sockets and other file systems from warnings", () => {
    const { lines, log } = recorder();
    const messages = new TarMessages(log);
    messages.add("Total bytes written: 440494080 (421MiB, 300MiB/s)");
    messages.add("tar: ./run/a.sock: socket ignored");
    messages.add("tar: ./run/b.sock: socket ignored");
    messages.add("tar: ./mnt/: file is on a different filesystem; not dumped");
    messages.add("tar: ./x: file changed as we read it");
    messages.close();
    expect(messages.totalBytes).toBe(440494080);
    expect(messages.warnings).toBe(1);
    expect(lines).toEqual([
      "info ./mnt/: file is on a different filesystem; not dumped",
      "warn ./x: file changed as we read it",
      'info left out 2 sockets, the first is "./run/a.sock"',
    ]);
  });

  it("gives the first real error as the reason, not tar's last words", () => {
    const messages = new TarMessages(() => undefined);
    messages.add("tar: ./a: file changed as we read it");
    messages.add("tar: ./b: Cannot open: Permission denied");
    messages.add("tar: ./c: Cannot open: Permission denied");
    messages.add("tar: Exiting with failure status due to previous errors");
    expect(messages.reason).toBe("./b: Cannot open: Permission denied");
  });

  it("does not fill the task log", () => {
    const { lines, log } = recorder();
    const messages = new TarMessages(log);
    for (let index = 0; index < 10_000; index++) messages.add(`tar: ./f${index}: File removed before we read it`);
    messages.close();
    expect(messages.warnings).toBe(10_000);
    expect(lines).toHaveLength(51);
    expect(lines.at(-1)).toBe("warn 9950 more warnings of this kind");
  });
});
