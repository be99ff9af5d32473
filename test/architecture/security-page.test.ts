// SPDX-License-Identifier: AGPL-3.0-or-later
// Holds docs/security.md and the tests together: each line that says what somebody cannot do names tests that exist.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");
const page = readFileSync(path.join(root, "docs/security.md"), "utf8");

/** Of the tables whose last column is headed "test": the names in it. */
function namedTests(): string[] {
  const names: string[] = [];
  let isOfTests = false;
  for (const line of page.split("\n")) {
    if (!line.startsWith("|")) isOfTests = false;
    else if (/\| test \|$/.test(line)) isOfTests = true;
    else if (isOfTests && !line.startsWith("|--")) {
      const cell = line.split("|").at(-2) ?? "";
      const found = [...cell.matchAll(/`([^`]+)`/g)].map((match) => match[1] ?? "");
      expect(found, line).not.toEqual([]);
      names.push(...found);
    }
  }
  return names;
}

it("docs/security.md names tests that exist", () => {
  const names = namedTests();
  expect(names.length).toBeGreaterThan(40);
  const fileOf = (name: string): string =>
    name.startsWith("perl-shim/") ? name : name === "hostile/share" ? "test/hostile/share" : `test/${name}.test.ts`;
  expect(names.filter((name) => !existsSync(path.join(root, fileOf(name))))).toEqual([]);
});

it("docs/security.md names every test of a share that others write to", () => {
  const files = readdirSync(path.join(root, "test/hostile/share"))
    .filter((name) => name.endsWith(".test.ts"))
    .map((name) => `hostile/share/${name.replace(".test.ts", "")}`);
  expect(files.filter((name) => !namedTests().includes(name))).toEqual([]);
});
