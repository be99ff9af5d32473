// SPDX-License-Identifier: AGPL-3.0-or-later
// Holds docs/architecture.md and the tree together: the same import rules as the test that enforces them, and only
// files that exist.
import { existsSync, readFileSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");
const read = (file: string): string => readFileSync(path.join(root, file), "utf8");
const page = read("docs/architecture.md");

/** Module -> what it may import, as the page's table has it. */
function rulesOfPage(): Map<string, string[]> {
  const table = page.split("| module | may import |")[1]?.split("\n\n")[0] ?? "";
  const rows = [...table.matchAll(/^\| `(\w+)` \| ([^|]+) \|/gm)];
  return new Map(rows.map(([, module = "", list = ""]) => [module, list === "nothing" ? [] : list.split(", ").sort()]));
}

/** The same of the table in imports.test.ts. */
function rulesOfTest(): Map<string, string[]> {
  const text = read("test/architecture/imports.test.ts").match(/const ALLOWED.* = \{\n([\s\S]*?)\n\};/)?.[1] ?? "";
  const rows = text.split(/^ {2}(?=\w+: \[)/m).filter((row) => row !== "");
  return new Map(
    rows.map((row) => [
      row.slice(0, row.indexOf(":")),
      [...row.matchAll(/"(\w+)"/g)].map(([, name = ""]) => name).sort(),
    ]),
  );
}

it("docs/architecture.md has the import rules that are enforced", () => {
  const enforced = rulesOfTest();
  expect(enforced.size).toBeGreaterThan(14);
  expect(rulesOfPage()).toEqual(enforced);
});

it("docs/architecture.md names files and folders that exist", () => {
  const names = [...page.matchAll(/`((?:src|bridge|test|fixtures|docs|perl-shim|packaging)\/[\w./-]*)`/g)].map(
    ([, name = ""]) => name,
  );
  expect(names.length).toBeGreaterThan(40);
  expect(names.filter((name) => !existsSync(path.join(root, name)))).toEqual([]);
});
