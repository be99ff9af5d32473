// SPDX-License-Identifier: AGPL-3.0-or-later
// Holds docs/fault-matrix.md and test/fault together: no empty cell, no cell without a test, no test without a cell.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");
const page = readFileSync(path.join(root, "docs/fault-matrix.md"), "utf8");

/** `- K1: [name](../test/fault/x.test.ts) "title"`: what a cell's K1 stands for. */
const DEFINITION = /^- ([A-Z]\d+): \[[^\]]+\]\(\.\.\/(test\/[^)]+)\) "(.+)"$/gm;
/** A cell names tests, or says in words why there is nothing to test. */
const REFERENCES = /\b[A-Z]\d+\b/g;
const NOT_APPLICABLE = /^– \w/;

interface Definition {
  readonly id: string;
  readonly file: string;
  readonly title: string;
}

const definitions: Definition[] = [...page.matchAll(DEFINITION)].map((match) => ({
  id: match[1] ?? "",
  file: match[2] ?? "",
  title: match[3] ?? "",
}));

/** The cells of all tables, without heads, rules and the first column. */
const cells = page
  .split("\n")
  .filter(
    (line, index, lines) =>
      line.startsWith("|") && !line.startsWith("|--") && !(lines[index + 1] ?? "").startsWith("|--"),
  )
  .flatMap((line) =>
    line
      .split("|")
      .slice(2, -1)
      .map((cell) => cell.trim()),
  );

/** Titles as they stand in the source: `it("…"`, also behind `.each(…)`. */
function titlesIn(file: string): string[] {
  const text = readFileSync(path.join(root, file), "utf8");
  const found = text.matchAll(
    /\bit(?:\.concurrent)?(?:\.(?:each|for)(?:<[^(]*>)?\([\s\S]*?\))?\(\s*(["'`])((?:\\.|(?!\1).)+)\1/g,
  );
  return [...found].map((match) => match[2] ?? "");
}

describe("the fault matrix", () => {
  it("has no empty cell, and a reason where there is no test", () => {
    expect(cells.length).toBeGreaterThan(50);
    const bare = cells.filter((cell) => cell.match(REFERENCES) === null && !NOT_APPLICABLE.test(cell));
    expect(bare).toEqual([]);
  });

  it("says which test each cell stands for, once", () => {
    const known = definitions.map(({ id }) => id);
    expect(new Set(known).size).toBe(known.length);
    const used = new Set(cells.flatMap((cell) => cell.match(REFERENCES) ?? []));
    expect([...used].filter((id) => !known.includes(id))).toEqual([]);
    expect(known.filter((id) => !used.has(id))).toEqual([]);
  });

  it.each(definitions)("$id is a test of $file", ({ file, title }) => {
    expect(titlesIn(file)).toContain(title);
  });

  it("names every test of test/fault", () => {
    const named = new Set(definitions.map(({ file, title }) => `${file}: ${title}`));
    const files = readdirSync(path.join(root, "test/fault")).filter((name) => name.endsWith(".test.ts"));
    const unnamed = files
      .map((name) => `test/fault/${name}`)
      .flatMap((file) => titlesIn(file).map((title) => `${file}: ${title}`))
      .filter((test) => !named.has(test));
    expect(unnamed).toEqual([]);
  });
});
