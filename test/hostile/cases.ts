// SPDX-License-Identifier: AGPL-3.0-or-later
// What the generated hostile cases share: how many, how they are made from sound ones, and how a suite
// shows that its cases get past the front door.
import fc from "fast-check";
import { expect } from "vitest";
import { HostError } from "../../src/core/index.ts";

/** Cases of each generated suite. */
export const CASES = 100_000;
/** For a loaded machine: a hang is still found. */
export const CASES_TIMEOUT_MS = 600_000;

/** A change of bytes: where, as a part of the whole, and what. */
interface ByteEdit {
  readonly kind: "flip" | "set" | "cut" | "insert" | "repeat" | "word" | "long";
  /** 0 to 65535 of the length. */
  readonly at: number;
  readonly value: number;
}

/** Integers at which lengths, counts and offsets go wrong. */
const EDGES = [
  0n,
  1n,
  2n,
  7n,
  8n,
  9n,
  0xffn,
  0x100n,
  0x7fffn,
  0x8000n,
  0xffffn,
  0x10000n,
  0x7fffffffn,
  0x80000000n,
  0xfffffff7n,
  0xffffffffn,
  0x100000000n,
  (1n << 53n) - 1n,
  1n << 53n,
  (1n << 62n) - 1n,
  1n << 62n,
  (1n << 63n) - 1n,
  1n << 63n,
  (1n << 64n) - 1n,
];

const byteEdit: fc.Arbitrary<ByteEdit> = fc.record({
  kind: fc.constantFrom<ByteEdit["kind"]>("flip", "set", "cut", "insert", "repeat", "word", "long"),
  at: fc.nat(0xffff),
  value: fc.nat(0xffff),
});

/** No edit at all in about every third case: what is sound must get through. */
export const byteEdits: fc.Arbitrary<readonly ByteEdit[]> = fc.oneof(
  { weight: 1, arbitrary: fc.constant([]) },
  { weight: 2, arbitrary: fc.array(byteEdit, { minLength: 1, maxLength: 3 }) },
);

export function editBytes(sound: Buffer, edits: readonly ByteEdit[]): Buffer {
  let bytes = sound;
  for (const edit of edits) bytes = editOnce(bytes, edit);
  return bytes;
}

function editOnce(bytes: Buffer, { kind, at, value }: ByteEdit): Buffer {
  const place = Math.floor((at / 0x10000) * (bytes.length + 1));
  if (kind === "cut") return bytes.subarray(0, place);
  if (kind === "insert") {
    const piece = Buffer.alloc(1 + (value % 9), value >> 8);
    return Buffer.concat([bytes.subarray(0, place), piece, bytes.subarray(place)]);
  }
  if (kind === "repeat") {
    const end = Math.min(bytes.length, place + 1 + (value % 40));
    return Buffer.concat([bytes.subarray(0, end), bytes.subarray(place)]);
  }
  const copy = Buffer.from(bytes);
  const edge = EDGES[value % EDGES.length] as bigint;
  if (kind === "long" && place + 8 <= copy.length) copy.writeBigUInt64BE(edge, place);
  else if (kind === "word" && place + 4 <= copy.length) copy.writeUInt32BE(Number(edge & 0xffffffffn), place);
  else if (place < copy.length)
    copy[place] = kind === "set" ? value & 0xff : (copy[place] as number) ^ (1 << (value % 8));
  return copy;
}

/** Counts what became of the cases. */
export class Tally {
  readonly #counts = new Map<string, number>();

  add(outcome: string): void {
    this.#counts.set(outcome, (this.#counts.get(outcome) ?? 0) + 1);
  }

  of(outcome: string): number {
    return this.#counts.get(outcome) ?? 0;
  }

  /** Every outcome at least so often: the cases reach that deep. */
  expectAtLeast(wanted: Readonly<Record<string, number>>): void {
    const rare = Object.entries(wanted).filter(([outcome, count]) => this.of(outcome) < count);
    expect(rare, JSON.stringify(Object.fromEntries(this.#counts), undefined, 1)).toEqual([]);
  }
}

/** expect() costs too much where it is called a million times. */
export function must(isTrue: boolean, what: string): void {
  if (!isTrue) throw new Error(`not so: ${what}`);
}

/** Longest sentence that a task log should have to hold. */
const MAX_SENTENCE_CHARS = 4000;

/** Fails unless `text` is one printable line. */
export function expectOneLine(text: string): void {
  if (text === "" || text.length > MAX_SENTENCE_CHARS || /[\p{Cc}\u2028\u2029]/u.test(text)) {
    throw new Error(`not one line: ${JSON.stringify(text.slice(0, 500))}`);
  }
}

/** Fails unless `error` is one that we raise on purpose, with a message of one line. */
export function expectHostError(error: unknown): HostError {
  if (!(error instanceof HostError)) throw new Error("an error that is none of ours", { cause: error });
  expectOneLine(error.message);
  return error;
}

/** What `act` throws; undefined if it does not. */
export function thrownBy(act: () => unknown): unknown {
  try {
    act();
  } catch (error) {
    return error;
  }
  return undefined;
}

/** "Cannot use image "x": its L1 table has 9 entries" -> "its L1 table has # entries": one kind of refusal. */
export function kindOf(message: string): string {
  return message.replace(/^Cannot [^:]*: /, "").replace(/0x[0-9a-f]+|[0-9]+/g, "#");
}
