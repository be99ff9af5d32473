// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { oneLine, quote, shortenMiddle, shortPath, toBytes, toText } from "../../../src/core/index.ts";

describe("shortenMiddle()", () => {
  it("keeps the beginning and the end, within the bound", () => {
    expect(shortenMiddle("abcdefghijklmnopqrstuvwxyz", 10)).toBe("abc…uvwxyz");
    expect(shortenMiddle("abcdefghij", 10)).toBe("abcdefghij");
  });
});

describe("shortPath()", () => {
  it("leaves a path of usual length whole, and keeps the file's name of a long one", () => {
    const usual = "/mnt/pve/backup-provider/100/qemu-1767225600/drive-scsi0.qcow2";
    expect(shortPath(usual)).toBe(usual);
    const long = shortPath(`/srv/${"a/".repeat(2_000)}drive-scsi0.qcow2`);
    expect(long).toMatch(/^\/srv\/a\/.*….*\/drive-scsi0\.qcow2$/);
    expect(long.length).toBe(200);
  });
});

describe("oneLine()", () => {
  it("folds control characters and line ends of every kind", () => {
    expect(oneLine(" a\r\nb\u2028c\u0007d ")).toBe("a b c d");
  });
});

describe("quote()", () => {
  it("bounds a name and escapes what a terminal would obey", () => {
    expect(quote("a\u001b[2J")).toBe('"a\\u001b[2J"');
    expect(quote("x".repeat(200))).toBe(`"${"x".repeat(80)}..."`);
  });
});

describe("toBytes() and toText()", () => {
  it("turn a text into one character per byte, and back", () => {
    expect(toBytes("é")).toBe("\u00c3\u00a9");
    expect(toText("\u00c3\u00a9")).toBe("é");
    expect(toText("\u00ff")).toBe("\ufffd");
  });
});
