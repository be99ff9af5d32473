// SPDX-License-Identifier: AGPL-3.0-or-later
// Reads small JSON files strictly: anyone may have written them. A wrong field is a FileProblem, which the caller
// turns into its own error.
import { FileProblem } from "../../host/index.ts";

/** Largest file any of the parsers is given. */
export const MAX_JSON_BYTES = 16 * 1024 * 1024;

/** What a text must match, or be. */
type Expected = RegExp | ((text: string) => boolean);

const isExpected = (text: string, expected: Expected): boolean =>
  expected instanceof RegExp ? expected.test(text) : expected(text);

/** One JSON object, field by field. Fields that are not asked for are ignored. */
export class Fields {
  readonly #value: object;
  readonly #where: string;

  constructor(value: unknown, where = "") {
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      throw new FileProblem(`${where === "" ? "it" : `field ${where}`} is not a JSON object`);
    }
    this.#value = value;
    this.#where = where;
  }

  /** Undefined for a missing field and for null. */
  raw(name: string): unknown {
    const value: unknown = Object.hasOwn(this.#value, name) ? Reflect.get(this.#value, name) : undefined;
    return value === null ? undefined : value;
  }

  has(name: string): boolean {
    return this.raw(name) !== undefined;
  }

  text(name: string, expected: Expected): string {
    const value = this.raw(name);
    if (typeof value !== "string" || !isExpected(value, expected))
      throw this.problem(name, "is missing or not as expected");
    return value;
  }

  optionalText(name: string, expected: Expected): string | undefined {
    return this.has(name) ? this.text(name, expected) : undefined;
  }

  oneOf<T extends string>(name: string, allowed: readonly T[]): T {
    const value = allowed.find((one) => one === this.raw(name));
    if (value === undefined) throw this.problem(name, `is not one of ${allowed.join(", ")}`);
    return value;
  }

  /** A whole number from 0 to `max`. */
  count(name: string, max: number = Number.MAX_SAFE_INTEGER): number {
    const value = this.raw(name);
    if (typeof value !== "number" || !Number.isSafeInteger(value) || value < 0 || value > max) {
      throw this.problem(name, "is not a whole number in range");
    }
    return value;
  }

  flag(name: string): boolean {
    const value = this.raw(name);
    if (typeof value !== "boolean") throw this.problem(name, "is not true or false");
    return value;
  }

  object(name: string): Fields {
    return new Fields(this.raw(name), this.#path(name));
  }

  /** Reads an object whose names are data, field by field. */
  entries(): Array<[string, unknown]> {
    return Object.entries(this.#value);
  }

  list(name: string, maxItems: number): unknown[] {
    const value = this.raw(name);
    if (!Array.isArray(value) || value.length > maxItems) throw this.problem(name, "is not a list, or too long");
    return value;
  }

  problem(name: string, state: string): FileProblem {
    return new FileProblem(`field ${this.#path(name)} ${state}`);
  }

  #path(name: string): string {
    return this.#where === "" ? name : `${this.#where}.${name}`;
  }
}

/** @throws FileProblem if `bytes` is not JSON */
export function parseJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString("utf8"));
  } catch {
    throw new FileProblem("it is not valid JSON"); // V8 would quote it, and anyone may have written it
  }
}

/** A document of a newer version: it is not damaged, and its meaning must not be guessed at. */
export class NewerFormatProblem extends FileProblem {}

/** Checks `format` and `version`: what a newer release wrote must not be guessed at. */
export function checkFormat(fields: Fields, format: string, version: number): void {
  if (fields.raw("format") !== format) throw new FileProblem(`it is not a ${format} file`);
  const found = fields.count("version");
  if (found > version) {
    throw new NewerFormatProblem(
      `it was written by a newer version (format ${found}, this version reads up to ${version})`,
    );
  }
  if (found < 1) throw new FileProblem("field version is not a whole number in range");
}

export function formatJson(value: unknown): Buffer {
  return Buffer.from(`${JSON.stringify(value, null, 2)}\n`, "utf8");
}
