// SPDX-License-Identifier: AGPL-3.0-or-later
// package.json and the imports agree: what the programs ship with is what they import.
import { readdirSync, readFileSync } from "node:fs";
import { isBuiltin } from "node:module";
import path from "node:path";
import ts from "typescript";
import { expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");
const { dependencies, devDependencies } = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8")) as {
  readonly dependencies: Readonly<Record<string, string>>;
  readonly devDependencies: Readonly<Record<string, string>>;
};

/** Types, and a program. */
const IMPORTED_BY_NOTHING = /^@types\/|^@biomejs\/biome$/;

/** The packages that files below `folders` import, in any way; "ajv/dist/x.js" is "ajv". */
function importedPackages(...folders: readonly string[]): string[] {
  const packages = new Set<string>();
  for (const folder of folders) {
    const names = readdirSync(path.join(root, folder), { recursive: true, encoding: "utf8" });
    for (const name of names.filter((one) => /\.(?:ts|mjs)$/.test(one) && !one.includes("generated"))) {
      const text = readFileSync(path.join(root, folder, name), "utf8");
      for (const { fileName: specifier } of ts.preProcessFile(text, true, true).importedFiles) {
        if (/^[./]/.test(specifier) || isBuiltin(specifier)) continue;
        packages.add(specifier.split("/", specifier.startsWith("@") ? 2 : 1).join("/"));
      }
    }
  }
  return [...packages].sort();
}

it("every dependency is imported by the programs, and every package they import is a dependency", () => {
  expect(importedPackages("src", "bridge")).toEqual(Object.keys(dependencies).sort());
});

it("tests and scripts import nothing else than that and the development dependencies", () => {
  const known = [...Object.keys(dependencies), ...Object.keys(devDependencies)];
  const imported = importedPackages("test", "fixtures", "scripts");
  expect(imported.filter((name) => !known.includes(name))).toEqual([]);
  const unused = Object.keys(devDependencies).filter(
    (name) => !imported.includes(name) && !IMPORTED_BY_NOTHING.test(name),
  );
  expect(unused).toEqual([]);
});
