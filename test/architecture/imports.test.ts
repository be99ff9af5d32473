// SPDX-License-Identifier: AGPL-3.0-or-later
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");

/** Module -> modules it may import, besides itself. */
const ALLOWED: Readonly<Record<string, readonly string[]>> = {
  core: [],
  block: ["core"],
  host: ["core"],
  nbd: ["core", "block"],
  qcow2: ["core", "block", "host"],
  archive: ["core", "block", "host"],
  device: ["core", "block", "host"],
  store: ["core", "block", "host", "qcow2"],
  provider: ["core", "block", "host", "nbd", "qcow2", "archive", "device", "store"],
  bridge: ["core", "provider"],
  cli: ["core", "host", "store", "provider", "qcow2", "archive"],
};
/** `core` computes; it neither reads files nor talks to a network. */
const FORBIDDEN_IN_CORE = /^node:(fs|net|http|https|dgram|tls|child_process|worker_threads)/;

interface Import {
  readonly file: string;
  readonly module: string;
  readonly specifier: string;
}

function sourceFiles(folder: string): string[] {
  return readdirSync(path.join(root, folder), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".ts") && !name.endsWith(".d.ts"))
    .map((name) => path.join(folder, name));
}

/** "src/nbd/wire.ts" -> "nbd", "bridge/main.ts" -> "bridge". */
function moduleOf(file: string): string {
  const parts = file.split(path.sep);
  return parts[0] === "src" ? (parts[1] ?? "") : (parts[0] ?? "");
}

function importsOf(file: string): Import[] {
  const text = readFileSync(path.join(root, file), "utf8");
  const found = text.matchAll(/(?:from\s+|import\s*\(\s*|import\s+)["']([^"']+)["']/g);
  return [...found].map((match) => ({ file, module: moduleOf(file), specifier: match[1] ?? "" }));
}

const files = [...sourceFiles("src"), ...sourceFiles("bridge")];
const imports = files.flatMap(importsOf);
const relative = imports
  .filter(({ specifier }) => specifier.startsWith(".") && specifier.endsWith(".ts"))
  .map((entry) => ({ ...entry, target: path.normalize(path.join(path.dirname(entry.file), entry.specifier)) }));

describe("import rules", () => {
  it("finds the imports at all", () => {
    expect(relative.length).toBeGreaterThan(50);
  });

  it("knows every module", () => {
    expect([...new Set(files.map(moduleOf))].filter((module) => !(module in ALLOWED))).toEqual([]);
  });

  it("lets a module import only the modules below it", () => {
    const wrong = relative.filter(({ module, target }) => {
      const to = moduleOf(target);
      return to !== module && !(ALLOWED[module] ?? []).includes(to);
    });
    expect(wrong.map(({ file, specifier }) => `${file} -> ${specifier}`)).toEqual([]);
  });

  it("enters another module only through its index.ts", () => {
    const wrong = relative.filter(
      ({ module, target }) => moduleOf(target) !== module && path.basename(target) !== "index.ts",
    );
    expect(wrong.map(({ file, specifier }) => `${file} -> ${specifier}`)).toEqual([]);
  });

  it("keeps files and sockets out of core", () => {
    const wrong = imports.filter(({ module, specifier }) => module === "core" && FORBIDDEN_IN_CORE.test(specifier));
    expect(wrong.map(({ file, specifier }) => `${file} -> ${specifier}`)).toEqual([]);
  });
});

describe("source files", () => {
  it("carry the license line first", () => {
    const everything = [...files, ...sourceFiles("test"), ...sourceFiles("fixtures")];
    const wrong = everything.filter(
      (file) =>
        !/^(#!.*\n)?\/\/ SPDX-License-Identifier: AGPL-3\.0-or-later\n/.test(
          readFileSync(path.join(root, file), "utf8"),
        ),
    );
    expect(wrong).toEqual([]);
  });

  it("stay below 400 lines", () => {
    const long = files.filter((file) => readFileSync(path.join(root, file), "utf8").split("\n").length > 400);
    expect(long).toEqual([]);
  });
});
