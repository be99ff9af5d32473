// SPDX-License-Identifier: AGPL-3.0-or-later
// Generated files before the parser of their kind: what it takes must be exactly what the format allows.
import fc from "fast-check";
import { FileProblem } from "../../../src/host/index.ts";
import { byteEdits, editBytes, expectOneLine, kindOf, must, Tally } from "../cases.ts";
import { editJson, jsonEdits } from "../json-cases.ts";

interface FileKind<T> {
  readonly sound: readonly object[];
  /** Undefined or a FileProblem where it refuses. */
  readonly parse: (bytes: Buffer) => T | undefined;
  /** The format, by other means. */
  readonly allows: (text: string) => boolean;
  /** What must hold of what was taken. */
  readonly check?: (taken: T, text: string) => void;
}

/** @returns what became of the cases: "sound", "taken in spite of an edit", "refused", and each kind of refusal */
export function holdToFormat<T>({ sound, parse, allows, check }: FileKind<T>, seed: number, numRuns: number): Tally {
  const tally = new Tally();
  fc.assert(
    fc.property(fc.nat(sound.length - 1), jsonEdits, byteEdits, fc.nat(3), (index, edits, bytes, part) => {
      const whole = Buffer.from(editJson(sound[index], edits));
      const input = part === 0 ? editBytes(whole, bytes) : whole;
      const text = input.toString();
      let taken: T | undefined;
      try {
        taken = parse(input);
      } catch (error) {
        if (!(error instanceof FileProblem)) throw error;
        expectOneLine(error.message);
        tally.add(/^it is not valid JSON/.test(error.message) ? "no JSON" : kindOf(error.message));
      }
      must((taken !== undefined) === allows(text), `taken: ${taken !== undefined}: ${text}`);
      if (taken === undefined) return tally.add("refused");
      check?.(taken, text);
      tally.add(edits.length === 0 && part !== 0 ? "sound" : "taken in spite of an edit");
    }),
    { seed, numRuns },
  );
  return tally;
}
