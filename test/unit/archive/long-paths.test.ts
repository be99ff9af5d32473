// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { LongPathLines, LongPaths } from "../../../src/archive/long-paths.ts";

describe("LongPaths", () => {
  it("warns once, with the number and the beginning of the first", () => {
    const paths = new LongPaths();
    const log: string[] = [];
    expect(paths.report((level, text) => log.push(`${level} ${text}`))).toBe(0);
    paths.add(`./a\n\u00c3\u00a9${"n".repeat(4000)}`); // bytes of "é"
    paths.add(`./${"m".repeat(4000)}`);
    expect(paths.report((level, text) => log.push(`${level} ${text}`))).toBe(1);
    expect(log).toEqual([
      "warn left out 2 files and directories with a path longer than 3840 bytes, which no restore can create: " +
        `the first begins with "./a\\né${"n".repeat(75)}..."`,
    ]);
  });
});

describe("LongPathLines", () => {
  it("excludes from a directory each name that makes the path longer than the limit, and no shorter one", () => {
    const parent = `${"d".repeat(200)}/`.repeat(18).slice(0, -1); // "./" and 3617 bytes, and a slash: 220 remain
    const [plain = "", hidden = "", ...more] = new LongPathLines().add(`${parent}/${"x".repeat(221)}`);
    expect(more).toEqual([]);
    expect(plain).toBe(`\\${parent}/${"?".repeat(221)}*`);
    expect(hidden).toBe(`\\${parent}/.${"?".repeat(220)}*`);
  });

  it("takes every name where the directory itself is as long as the limit", () => {
    const parent = "p/".repeat(1919).slice(0, -1); // 3839 bytes with "./"
    const [plain = "", hidden = ""] = new LongPathLines().add(`${parent}/x`);
    expect([plain.slice(-3), hidden.slice(-3)]).toEqual(["/?*", "/.*"]);
  });

  it("tells of a directory once, and of no more than a thousand", () => {
    const lines = new LongPathLines();
    let count = 0;
    for (let at = 0; at < 2000; at++) {
      for (const name of ["x", "y"]) count += lines.add(`${"d/".repeat(1900)}${at}/${name.repeat(200)}`).length;
    }
    expect(count).toBe(2000);
  });
});
