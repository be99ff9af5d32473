// SPDX-License-Identifier: AGPL-3.0-or-later
// What a tool complains about, passed to the task log up to a bound, and counted.
import { oneLine } from "../core/index.ts";
import type { ArchiveJob } from "./job.ts";

/** A container can hold a million files that vanish; the task log is for people. */
const MAX_LOGGED = 50;
const MAX_KEPT = 5;
const MAX_CHARS = 500;

export class Warnings {
  readonly #log: ArchiveJob["log"];
  readonly #first: string[] = [];
  #count = 0;

  constructor(log: ArchiveJob["log"]) {
    this.#log = log;
  }

  get count(): number {
    return this.#count;
  }

  /** The first ones, for an error message. */
  get summary(): string {
    const more = this.#count - this.#first.length;
    return this.#first.join("; ") + (more > 0 ? `; and ${more} more` : "");
  }

  add(message: string): void {
    this.#count++;
    const line = oneLine(message).slice(0, MAX_CHARS);
    if (this.#first.length < MAX_KEPT) this.#first.push(line);
    if (this.#count <= MAX_LOGGED) this.#log("warn", line);
  }

  /** Says how many warnings were too many to log. Call once, at the end. */
  close(): void {
    if (this.#count > MAX_LOGGED) this.#log("warn", `${this.#count - MAX_LOGGED} more warnings of this kind`);
  }
}
