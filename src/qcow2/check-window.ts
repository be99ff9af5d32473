// SPDX-License-Identifier: AGPL-3.0-or-later
// References to a window of host clusters, counted in 16 bits each: the part of a check that bounds
// its memory, whatever the size of the file.

/** 32 MiB of counters; 1 TiB of a file with 64 KiB clusters. */
export const WINDOW_CLUSTERS = 2 ** 24;

/** Set where a table or a data cluster lives, which nothing else may refer to. */
const EXCLUSIVE = 0x8000;
const COUNT_MASK = 0x7fff;

export class ReferenceWindow {
  readonly start: number;
  readonly end: number;
  /** The windows of this one's size behind it, by number, that were referred to. */
  readonly windowsBeyond = new Set<number>();
  readonly #counts: Uint16Array;

  /** Covers host clusters [start, end). */
  constructor(start: number, end: number) {
    this.start = start;
    this.end = end;
    this.#counts = new Uint16Array(end - start);
  }

  /** Counts one reference to a cluster; false if it is already somebody else's alone. */
  addExclusive(cluster: number): boolean {
    if (this.#isElsewhere(cluster)) return true;
    const at = cluster - this.start;
    const before = this.#counts[at] as number;
    this.#count(at);
    this.#counts[at] = (this.#counts[at] as number) | EXCLUSIVE;
    return before === 0;
  }

  /** Counts one reference to a cluster that compressed clusters share. */
  addShared(cluster: number): boolean {
    if (this.#isElsewhere(cluster)) return true;
    const at = cluster - this.start;
    this.#count(at);
    return ((this.#counts[at] as number) & EXCLUSIVE) === 0;
  }

  /** References to a cluster of the window. */
  references(cluster: number): number {
    return (this.#counts[cluster - this.start] as number) & COUNT_MASK;
  }

  #isElsewhere(cluster: number): boolean {
    if (cluster >= this.end) this.windowsBeyond.add(Math.floor(cluster / (this.end - this.start)));
    return cluster < this.start || cluster >= this.end;
  }

  #count(at: number): void {
    const value = this.#counts[at] as number;
    if ((value & COUNT_MASK) < COUNT_MASK) this.#counts[at] = value + 1;
  }
}
