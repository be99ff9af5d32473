// SPDX-License-Identifier: AGPL-3.0-or-later
// What is exported is imported somewhere, and code of the product is called by the product, not by its tests alone.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import ts from "typescript";
import { describe, expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");

/** Exported for a tool or a framework that imports by itself. */
const CALLED_FROM_OUTSIDE = ["setup", "teardown"].map((name) => `test/support/programs/build-once.ts ${name}`);

/** Called by tests alone, and kept: why. */
const KEPT: Readonly<Record<string, string>> = {
  "src/archive/browse.ts listTar": "a command line that shows what is in an archive",
  "src/archive/browse.ts extractFile": "the same",
  "src/nbd/index.ts NbdServer": "serves the disks of a backup; the views of a disk in device come next",
  "src/nbd/index.ts NbdExport": "the same",
  "src/nbd/index.ts ZeroExtent": "the same",
};

/** The other half of a decoder: bytes that a test makes by hand are held against it. */
const ENCODER = /\.ts encode[A-Z]/;

interface Module {
  readonly file: string;
  readonly names: ReadonlySet<string>;
  /** Exported under a name, but declared elsewhere. */
  readonly passedOn: ReadonlyMap<string, { readonly target: string; readonly name: string }>;
  readonly imports: readonly { readonly target: string; readonly name: string }[];
  /** How often each identifier occurs. */
  readonly identifiers: ReadonlyMap<string, number>;
}

const ALL = "*";

function readModule(file: string): Module {
  const source = ts.createSourceFile(file, readFileSync(path.join(root, file), "utf8"), ts.ScriptTarget.Latest, true);
  const names = new Set<string>();
  const passedOn = new Map<string, { target: string; name: string }>();
  const imports: { target: string; name: string }[] = [];
  const identifiers = new Map<string, number>();
  const use = (from: ts.Node | undefined, ...used: string[]): string | undefined => {
    if (from === undefined || !ts.isStringLiteral(from) || !from.text.startsWith(".")) return undefined;
    const target = path.join(path.dirname(file), from.text);
    for (const name of used) imports.push({ target, name });
    return target;
  };
  const visit = (node: ts.Node): void => {
    if (ts.isIdentifier(node)) identifiers.set(node.text, (identifiers.get(node.text) ?? 0) + 1);
    if (ts.isImportDeclaration(node)) {
      const bindings = node.importClause?.namedBindings;
      if (bindings === undefined || !ts.isNamedImports(bindings)) use(node.moduleSpecifier, ALL);
      else use(node.moduleSpecifier, ...bindings.elements.map((one) => (one.propertyName ?? one.name).text));
    } else if (
      ts.isExportDeclaration(node) &&
      node.exportClause !== undefined &&
      ts.isNamedExports(node.exportClause)
    ) {
      const target = use(node.moduleSpecifier);
      for (const one of node.exportClause.elements) {
        names.add(one.name.text);
        if (target !== undefined) passedOn.set(one.name.text, { target, name: (one.propertyName ?? one.name).text });
      }
    } else if (ts.isCallExpression(node) && node.expression.kind === ts.SyntaxKind.ImportKeyword) {
      use(node.arguments[0], ALL);
    } else if (ts.isImportTypeNode(node) && ts.isLiteralTypeNode(node.argument)) {
      use(node.argument.literal, node.qualifier?.getText() ?? ALL);
    } else if (ts.canHaveModifiers(node) && isExported(node)) {
      for (const name of declaredNames(node)) names.add(name);
    }
    ts.forEachChild(node, visit);
  };
  visit(source);
  return { file, names, passedOn, imports, identifiers };
}

const isExported = (node: ts.HasModifiers): boolean =>
  ts.getModifiers(node)?.some(({ kind }) => kind === ts.SyntaxKind.ExportKeyword) === true;

function declaredNames(node: ts.Node): string[] {
  if (ts.isVariableStatement(node)) return node.declarationList.declarations.flatMap(({ name }) => namesIn(name));
  const name = (node as ts.DeclarationStatement).name;
  return name === undefined ? [] : [name.getText()];
}

function namesIn(name: ts.BindingName): string[] {
  if (ts.isIdentifier(name)) return [name.text];
  return name.elements.flatMap((one) => (ts.isOmittedExpression(one) ? [] : namesIn(one.name)));
}

const modules = ["src", "bridge", "fixtures", "scripts", "test"].flatMap((folder) =>
  readdirSync(path.join(root, folder), { recursive: true, encoding: "utf8" })
    .filter((name) => /\.(?:ts|mjs)$/.test(name) && !name.endsWith(".d.ts"))
    .map((name) => readModule(path.join(folder, name))),
);
const byFile = new Map(modules.map((module) => [module.file, module]));

/** "src/a.ts name" -> the files that import it, also through an index.ts. */
const users = new Map<string, Set<string>>();
function note(target: string, name: string, user: string): void {
  const module = byFile.get(target);
  const meant = name === ALL ? [...(module?.names ?? [])] : [name];
  for (const one of meant) {
    const key = `${target} ${one}`;
    const known = users.get(key) ?? new Set();
    users.set(key, known.add(user));
    const origin = module?.passedOn.get(one);
    if (origin !== undefined) note(origin.target, origin.name, user);
  }
}
for (const { file, imports } of modules) for (const { target, name } of imports) note(target, name, file);

const isProduct = (file: string): boolean => /^(?:src|bridge)\//.test(file);
const exported = modules.flatMap((module) =>
  [...module.names].map((name) => ({ module, name, key: `${module.file} ${name}` })),
);

describe("exports", () => {
  it("are found at all", () => {
    expect(exported.length).toBeGreaterThan(500);
    expect(users.get("src/core/errors.ts HostError")?.size).toBeGreaterThan(10);
  });

  it("are imported somewhere", () => {
    const unused = exported.map(({ key }) => key).filter((key) => !users.has(key));
    expect(unused).toEqual(CALLED_FROM_OUTSIDE);
  });

  it("of the product are used by the product", () => {
    const idle = exported.filter(({ module, name, key }) => {
      if (!isProduct(module.file) || ENCODER.test(key)) return false;
      const isUsedWithin = !module.passedOn.has(name) && (module.identifiers.get(name) ?? 0) > 1;
      return !isUsedWithin && ![...(users.get(key) ?? [])].some(isProduct);
    });
    expect(idle.map(({ key }) => key)).toEqual(Object.keys(KEPT));
  });
});
