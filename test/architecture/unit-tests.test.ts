// SPDX-License-Identifier: AGPL-3.0-or-later
// test/unit mirrors the sources, file by file: the tests of src/nbd/connection.ts are test/unit/nbd/connection.test.ts
// and, where those are several files, connection.<what>.test.ts.
import { existsSync, readdirSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");

/** "nbd/connection.abort.test.ts" -> "src/nbd/connection.ts". The bridge and the tests' own support lie elsewhere. */
function sourceOf(test: string): string {
  const [module] = test.split(path.sep);
  const name = test.replace(/(\.[\w-]+)?\.test\.ts$/, ".ts");
  if (module === "bridge") return name;
  return path.join(module === "support" ? "test" : "src", name);
}

it("each unit test is named after the file that it tests", () => {
  const tests = readdirSync(path.join(root, "test/unit"), { recursive: true, encoding: "utf8" }).filter((name) =>
    name.endsWith(".test.ts"),
  );
  expect(tests.length).toBeGreaterThan(50);
  expect(tests.filter((test) => !existsSync(path.join(root, sourceOf(test))))).toEqual([]);
});
