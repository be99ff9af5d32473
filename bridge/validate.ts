// SPDX-License-Identifier: AGPL-3.0-or-later
// Checks messages against protocol.schema.json, with precompiled validators.
import type { ErrorObject, ValidateFunction } from "ajv";
import { RequestError } from "../src/core/index.ts";
import * as validators from "./generated/validators.mjs";

const table: Readonly<Record<string, ValidateFunction>> = validators;

/** Longest piece of a wrong value that goes into a message. */
const MAX_SHOWN = 80;

/** True if the protocol has a request of this name, in the direction of this process. */
export function hasValidators(method: string): boolean {
  return Object.hasOwn(table, `${method}_params`);
}

/** @throws RequestError with the first thing that is wrong */
export function assertParams(method: string, params: unknown): void {
  const problem = firstProblem(`${method}_params`, params);
  if (problem !== undefined) throw new RequestError(`Cannot run "${method}": ${problem}`);
}

/** @throws Error: a result of our own that breaks the protocol is a bug. */
export function assertResult(method: string, result: unknown): void {
  const problem = firstProblem(`${method}_result`, result);
  if (problem !== undefined) throw new Error(`Result of "${method}" breaks the protocol: ${problem}`);
}

/** @throws Error: a reverse request of our own that breaks the protocol is a bug. */
export function assertReverseParams(method: string, params: unknown): void {
  const problem = firstProblem(`${method}_params`, params);
  if (problem !== undefined) throw new Error(`Params of "${method}" break the protocol: ${problem}`);
}

/** @throws RequestError if the peer answered a reverse request wrongly */
export function assertReverseResult(method: string, result: unknown): void {
  const problem = firstProblem(`${method}_result`, result);
  if (problem !== undefined) throw new RequestError(`Cannot use the answer to "${method}": ${problem}`);
}

function firstProblem(name: string, value: unknown): string | undefined {
  const validate = table[name];
  if (validate === undefined) throw new Error(`the protocol has no ${name}`);
  if (validate(value)) return undefined;
  // For propertyNames, ajv reports the inner problem first: the name, and what is wrong with it.
  const [error] = validate.errors ?? [];
  return error === undefined ? "it is not valid" : describeProblem(error, value);
}

function describeProblem(error: ErrorObject, root: unknown): string {
  const where = error.instancePath.slice(1).replaceAll("~1", "/").replaceAll("~0", "~").replaceAll("/", ".");
  if (error.propertyName !== undefined) {
    return `${where || "a parameter"} has the name ${show(error.propertyName)}, which ${error.message ?? "is not valid"}`;
  }
  if (error.keyword === "required") return `${where ? `${where}: ` : ""}${error.message ?? "something is missing"}`;
  if (error.keyword === "additionalProperties") {
    return `${where || "it"} has the unknown parameter ${show(error.params.additionalProperty)}`;
  }
  if (error.keyword === "enum") {
    const expected = (error.params.allowedValues as unknown[]).map(show).join(", ");
    return `${where || "it"} is ${show(valueAt(root, error.instancePath))}, expected one of ${expected}`;
  }
  return `${where || "it"} is ${show(valueAt(root, error.instancePath))}, which ${error.message ?? "is not valid"}`;
}

function valueAt(root: unknown, pointer: string): unknown {
  let at = root;
  for (const part of pointer.split("/").slice(1)) {
    if (typeof at !== "object" || at === null) return undefined;
    at = (at as Record<string, unknown>)[part.replaceAll("~1", "/").replaceAll("~0", "~")];
  }
  return at;
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? "missing";
  return text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}…` : text;
}
