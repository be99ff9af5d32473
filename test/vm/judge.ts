// SPDX-License-Identifier: AGPL-3.0-or-later
// Turns the lines of the test machine into a verdict. What was planned and never reported has failed.
import type { ResultLine } from "./protocol.ts";

export class Judge {
  readonly #print: (line: string) => void;
  readonly #waiting = new Set<string>();
  #hasPlan = false;
  passed = 0;
  failed = 0;

  constructor(print: (line: string) => void) {
    this.#print = print;
  }

  /** A line of the guest. Anything else than a result of a planned test is shown, and counts as a failure. */
  take(line: string): void {
    const result = parseLine(line);
    if (result?.kind === "plan") {
      this.#hasPlan = true;
      for (const name of result.names) this.#waiting.add(name);
    } else if (result?.kind === "result" && this.#waiting.delete(result.name)) {
      this.#count(`${result.name} (${(result.ms / 1_000).toFixed(1)} s)`, result.error);
    } else {
      this.#count("reading the results", `unexpected line ${JSON.stringify(line)}`);
    }
  }

  /** @param trouble what became of the machine, if it did not end by itself */
  finish(trouble: string | undefined): void {
    for (const name of this.#waiting) this.#count(name, "the test machine ended before it");
    if (!this.#hasPlan) this.#count("starting the test machine", "it never began to test");
    if (trouble !== undefined) this.#count("ending the test machine", trouble);
  }

  #count(name: string, error: string | undefined): void {
    if (error === undefined) this.passed++;
    else this.failed++;
    this.#print(
      error === undefined ? `ok      vm: ${name}` : `FAILED  vm: ${name}\n${error.replace(/^/gm, "        ")}`,
    );
  }
}

function parseLine(line: string): ResultLine | undefined {
  try {
    return JSON.parse(line) as ResultLine;
  } catch {
    return undefined;
  }
}
