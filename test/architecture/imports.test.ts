// SPDX-License-Identifier: AGPL-3.0-or-later
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");

/** Module -> modules it may import, besides itself. docs/architecture.md draws it. */
const ALLOWED: Readonly<Record<string, readonly string[]>> = {
  core: [],
  host: ["core"],
  pve: ["core", "host"],
  digest: ["core", "host"],
  provider: ["core"],
  block: ["core"],
  nbd: ["core", "block"],
  qcow2: ["core", "block", "digest", "host"],
  archive: ["core", "block", "digest", "host"],
  device: ["core", "host", "nbd"],
  store: ["core", "host", "pve", "digest", "qcow2"],
  source: ["core", "block", "nbd", "device", "provider"],
  maintenance: ["core", "pve", "digest", "block", "qcow2", "archive", "store"],
  directory: [
    ...["core", "host", "pve", "digest", "provider", "block", "nbd", "qcow2", "archive", "device", "store", "source"],
    "maintenance",
  ],
  bridge: ["core", "provider"],
  cli: ["core", "pve", "store", "maintenance", "device", "nbd", "qcow2", "archive"],
};
/** The composition root: the one file that knows every provider. */
const COMPOSITION_ROOT = path.join("bridge", "main.ts");
/** A room inside a module -> other parts of the module it may import. */
const ROOMS: Readonly<Record<string, readonly string[]>> = {
  "store/format": [],
  "store/lock": ["store/format", "store/context.ts", "store/durable.ts", "store/errors.ts"],
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

/** "src/store/lock/lock-file.ts" -> "store/lock"; undefined outside of rooms that have rules. */
function roomOf(file: string): string | undefined {
  const room = path.dirname(path.relative("src", file));
  return room in ROOMS ? room : undefined;
}

/** The first circle of imports between files, in order; empty if there is none. */
function findCircle(all: readonly string[]): string[] {
  const done = new Set<string>();
  const visit = (file: string, trail: readonly string[]): string[] => {
    if (trail.includes(file)) return [...trail.slice(trail.indexOf(file)), file];
    if (done.has(file)) return [];
    for (const { target } of relative.filter((entry) => entry.file === file)) {
      const circle = visit(target, [...trail, file]);
      if (circle.length > 0) return circle;
    }
    done.add(file);
    return [];
  };
  for (const file of all) {
    const circle = visit(file, []);
    if (circle.length > 0) return circle;
  }
  return [];
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
    const wrong = relative.filter(({ file, module, target }) => {
      const to = moduleOf(target);
      return to !== module && !(ALLOWED[module] ?? []).includes(to) && file !== COMPOSITION_ROOT;
    });
    expect(wrong.map(({ file, specifier }) => `${file} -> ${specifier}`)).toEqual([]);
  });

  it("enters another module only through its index.ts", () => {
    const wrong = relative.filter(
      ({ module, target }) => moduleOf(target) !== module && path.basename(target) !== "index.ts",
    );
    expect(wrong.map(({ file, specifier }) => `${file} -> ${specifier}`)).toEqual([]);
  });

  it("keeps the rooms inside a module apart", () => {
    const wrong = relative.filter(({ file, module, target }) => {
      const room = roomOf(file);
      if (room === undefined || moduleOf(target) !== module || roomOf(target) === room) return false;
      const to = roomOf(target) ?? path.relative("src", target);
      return !(ROOMS[room] ?? []).includes(to);
    });
    expect(wrong.map(({ file, specifier }) => `${file} -> ${specifier}`)).toEqual([]);
  });

  it("has no circles, types included", () => {
    expect(findCircle(files)).toEqual([]);
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
