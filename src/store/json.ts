// SPDX-License-Identifier: AGPL-3.0-or-later
// Strict reading of small JSON files that anybody may have written. A wrong field is a JsonProblem,
// which the caller words into an error of its own.
import { constants } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { messageOf } from "../core/index.ts";

/** Why a file cannot be used, as a clause: "field uuid is missing". */
export class JsonProblem extends Error {}

/** Largest file any of the parsers is given. */
export const MAX_JSON_BYTES = 16 * 1024 * 1024;

/** One JSON object, field by field. Fields that nobody asks for are ignored. */
export class Fields {
  readonly #value: object;
  readonly #where: string;

  constructor(value: unknown, where = "") {
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      throw new JsonProblem(`${where === "" ? "it" : `field ${where}`} is not a JSON object`);
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

  text(name: string, pattern: RegExp): string {
    const value = this.raw(name);
    if (typeof value !== "string" || !pattern.test(value)) throw this.problem(name, "is missing or not as expected");
    return value;
  }

  optionalText(name: string, pattern: RegExp): string | undefined {
    return this.has(name) ? this.text(name, pattern) : undefined;
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

  /** Field by field of an object whose names are data. */
  entries(): Array<[string, unknown]> {
    return Object.entries(this.#value);
  }

  list(name: string, maxItems: number): unknown[] {
    const value = this.raw(name);
    if (!Array.isArray(value) || value.length > maxItems) throw this.problem(name, "is not a list, or too long");
    return value;
  }

  problem(name: string, state: string): JsonProblem {
    return new JsonProblem(`field ${this.#path(name)} ${state}`);
  }

  #path(name: string): string {
    return this.#where === "" ? name : `${this.#where}.${name}`;
  }
}

/** @throws JsonProblem if `bytes` is no JSON */
export function parseJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString("utf8"));
  } catch (error) {
    throw new JsonProblem(`it is not JSON: ${messageOf(error)}`);
  }
}

/** Checks `format` and `version`: what a newer release wrote must not be guessed at. */
export function checkFormat(fields: Fields, format: string, version: number): void {
  if (fields.raw("format") !== format) throw new JsonProblem(`it is not a ${format} file`);
  const found = fields.count("version");
  if (found > version) {
    throw new JsonProblem(`it was written by a newer version (format ${found}, this version reads up to ${version})`);
  }
  if (found < 1) throw new JsonProblem("field version is not a whole number in range");
}

export function formatJson(value: unknown): Buffer {
  return Buffer.from(`${JSON.stringify(value, null, 2)}\n`, "utf8");
}

/**
 * Opens a regular file for reading; symbolic links, pipes and devices are refused.
 *
 * @throws JsonProblem if it is no regular file; the system's error if it cannot be opened
 */
export async function openRegular(path: string): Promise<FileHandle> {
  // O_NONBLOCK: opening a pipe that somebody put there must not hang.
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  const handle = await open(path, flags).catch((error: NodeJS.ErrnoException) => {
    throw error.code === "ELOOP" ? new JsonProblem("it is a symbolic link, not a file") : error;
  });
  try {
    if (!(await handle.stat()).isFile()) throw new JsonProblem("it is not a regular file");
    return handle;
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/**
 * Reads a whole regular file of at most `maxBytes`.
 *
 * @throws JsonProblem if it is no regular file or larger; the system's error if it cannot be read
 */
export async function readSmallFile(path: string, maxBytes: number = MAX_JSON_BYTES): Promise<Buffer> {
  await using handle = await openRegular(path);
  const { size } = await handle.stat();
  if (size > maxBytes) throw new JsonProblem(`it is larger than ${maxBytes} bytes`);
  const bytes = Buffer.alloc(size);
  let filled = 0;
  while (filled < size) {
    const { bytesRead } = await handle.read(bytes, filled, size - filled, filled);
    if (bytesRead === 0) throw new JsonProblem("it became shorter while it was read");
    filled += bytesRead;
  }
  return bytes;
}
