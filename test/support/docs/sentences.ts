// SPDX-License-Identifier: AGPL-3.0-or-later
// The sentences that the sources can say to an administrator, with "…" for each variable part.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import ts from "typescript";

const PROJECT = path.resolve(import.meta.dirname, "../../..");
const VARIABLE = "…";

/** Functions that compose `Cannot <act> "<path>": <reason>`, where the act is their first argument. */
const WORDING = new Set(["environmentError", "explain", "wordProblem"]);

interface Sentence {
  readonly text: string;
  readonly file: string;
}

function filesBelow(folder: string, extension: string): string[] {
  return readdirSync(path.join(PROJECT, folder), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(extension) && !name.endsWith(".d.ts"))
    .map((name) => path.join(folder, name))
    .sort();
}

/** Text of a string, a template, or a sum of them; undefined for anything else. */
function textOf(node: ts.Node): string | undefined {
  if (ts.isStringLiteralLike(node)) return node.text;
  if (ts.isTemplateExpression(node)) {
    return node.head.text + node.templateSpans.map(({ literal }) => VARIABLE + literal.text).join("");
  }
  if (ts.isBinaryExpression(node) && node.operatorToken.kind === ts.SyntaxKind.PlusToken) {
    const [left, right] = [textOf(node.left), textOf(node.right)];
    if (left === undefined && right === undefined) return undefined;
    return (left ?? VARIABLE) + (right ?? VARIABLE);
  }
  return undefined;
}

/** What a call says: some functions state an act, a warning is the last argument with a text. */
function saidByCall(call: ts.CallExpression): string | undefined {
  const [first] = call.arguments;
  const name = call.expression.getText();
  if (WORDING.has(name) && first !== undefined) {
    const act = textOf(first);
    return act === undefined ? undefined : `Cannot ${act} "${VARIABLE}": ${VARIABLE}`;
  }
  const isWarning =
    /(^|[.#])warn$/.test(name) || (/log$/.test(name) && first !== undefined && textOf(first) === "warn");
  if (!isWarning) return undefined;
  return call.arguments
    .map(textOf)
    .filter((text) => text !== undefined && text !== "warn")
    .at(-1);
}

function sentencesOfScript(file: string): Sentence[] {
  const found = new Set<string>();
  const source = ts.createSourceFile(
    file,
    readFileSync(path.join(PROJECT, file), "utf8"),
    ts.ScriptTarget.Latest,
    true,
  );
  const visit = (node: ts.Node): void => {
    const text = ts.isCallExpression(node) ? saidByCall(node) : undefined;
    if (text !== undefined) found.add(text);
    const sentence = textOf(node);
    if (sentence?.startsWith("Cannot ")) found.add(sentence);
    else ts.forEachChild(node, visit);
  };
  visit(source);
  return [...found].map((text) => ({ text, file }));
}

/** Perl's: double-quoted strings, with scalars and `@{[…]}` as variables; a sum of two is taken as its first. */
function sentencesOfPerl(file: string): Sentence[] {
  const strings = readFileSync(path.join(PROJECT, file), "utf8").matchAll(/"(Cannot (?:[^"\\]|\\.)*)"/g);
  return [...strings].map(([, quoted = ""]) => ({
    file,
    text: quoted
      .replace(/@\{\[[^\]]*\]\}|\$\w+(?:->)?(?:\{[^}]*\})?/g, VARIABLE)
      .replace(/\\n/g, "")
      .replace(/\\(.)/g, "$1"),
  }));
}

/** All of them, except those that begin with a variable: they could not be looked up. */
export function findSentences(): Sentence[] {
  const all = [
    ...["src", "bridge"].flatMap((folder) => filesBelow(folder, ".ts")).flatMap(sentencesOfScript),
    ...filesBelow("perl-shim/PVE", ".pm").flatMap(sentencesOfPerl),
  ];
  return all.filter(({ text }) => !text.startsWith(VARIABLE) && !text.startsWith(`Cannot ${VARIABLE}`));
}

/** What a task log says in brackets after "full backup", one of every kind. */
export function findFullReasons(): string[] {
  const found = new Set<string>();
  const add = (node: ts.Node | undefined): void => {
    const text = node === undefined ? undefined : textOf(node);
    if (text !== undefined && text !== "") found.add(text);
  };
  const visit = (node: ts.Node): void => {
    if (ts.isNewExpression(node) && node.expression.getText() === "NotUsable") add(node.arguments?.[0]);
    if (ts.isPropertyAssignment(node) && node.name.getText() === "readAll") add(node.initializer);
    if (ts.isPropertyAssignment(node) && node.name.getText() === "reason" && /"full"/.test(node.parent.getText())) {
      add(node.initializer);
    }
    ts.forEachChild(node, visit);
  };
  for (const file of [...filesBelow("src/store", ".ts"), ...filesBelow("src/directory", ".ts")]) {
    visit(ts.createSourceFile(file, readFileSync(path.join(PROJECT, file), "utf8"), ts.ScriptTarget.Latest, true));
  }
  return [...found];
}
