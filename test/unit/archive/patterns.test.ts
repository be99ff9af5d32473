// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { nativeExcludeLines, pathExcludeLine, tarExcludeFlags } from "../../../src/archive/patterns.ts";

describe("tarExcludeFlags()", () => {
  it("puts unanchored patterns before anchored ones, and lost+found first", () => {
    expect(tarExcludeFlags(["/tmp/?*", "*.log", "/x"])).toEqual([
      ...["--no-anchored", "--exclude=lost+foun[d]", "--exclude=*.log"],
      ...["--anchored", "--exclude=./tmp/?*", "--exclude=./[x]"],
    ]);
  });

  it("gives a pattern without a wildcard one that matches the same", () => {
    const flags = tarExcludeFlags(["a\\*b", "a\\b", "/x/", "~é", "b\\[1\\]"]);
    expect(flags.filter((flag) => flag.startsWith("--exclude=")).slice(1)).toEqual([
      ...["--exclude=a\\*[b]", "--exclude=a[b]", "--exclude=~é", "--exclude=b\\[[1]\\]", "--exclude=./[x]/"],
    ]);
  });
});

describe("nativeExcludeLines()", () => {
  it("translates what matches within one component, leading periods included", () => {
    expect(nativeExcludeLines("*.log")).toEqual(["... *\\.log", "... .*\\.log", "... \\.log"]);
    expect(nativeExcludeLines("core*")).toEqual(["... core*"]);
    expect(nativeExcludeLines("/tmp/?*")).toEqual(["\\tmp/*", "\\tmp/.*"]);
    expect(nativeExcludeLines("/var/tmp/*")).toEqual(["\\var/tmp/*", "\\var/tmp/.*"]);
  });

  it("leaves to find what can match across a slash", () => {
    for (const pattern of ["a*b", "a?b", "/a*", "/*", "a/b", "/a/b", "[ab]", "\\*", "/var/run/?*.pid"]) {
      expect(nativeExcludeLines(pattern)).toBeUndefined();
    }
  });
});

describe("pathExcludeLine()", () => {
  it("escapes all that mksquashfs could read as more than a name", () => {
    expect(pathExcludeLine("a b/*x")).toBe("\\a\\ b/\\*x");
    expect(pathExcludeLine("#x")).toBe("\\\\#x"); // the first backslash of a line is dropped by mksquashfs
  });

  it("puts a newline as the only byte that a set does not hold", () => {
    expect(pathExcludeLine("a\nb")).toBe("\\a[!\u0001-\u0009\u000b-\u00ff]b");
    expect(pathExcludeLine("a\nb").split("\n")).toHaveLength(1);
  });
});
