// SPDX-License-Identifier: AGPL-3.0-or-later
// References to a window of host clusters, counted in 16 bits each: the part of a check that bounds
// its memory, whatever the size of the file.

/** 32 MiB of counters; 1 TiB of a file with 64 KiB clusters. */
export const WINDOW_CLUSTERS = 2 ** 24;

/** Set for a cluster that holds a table or data: nothing else may refer to it. */
const EXCLUSIVE = 0x8000;
const COUNT_MASK = 0x7fff;

export class ReferenceWindow {
  readonly start: number;
  readonly end: number;
  /** Numbers of the later windows, of this one's size, that were referred to. */
  readonly windowsBeyond = new Set<number>();
  readonly #counts: Uint16Array;

  /** Covers host clusters [start, end). */
  constructor(start: number, end: number) {
    this.start = start;
    this.end = end;
    this.#counts = new Uint16Array(end - start);
  }

  /** Counts one reference to a cluster; false if the cluster already has an exclusive owner. */
  addExclusive(cluster: number): boolean {
    if (this.#isElsewhere(cluster)) return true;
    const at = cluster - this.start;
    const before = this.#counts[at] as number;
    this.#count(at);
    this.#counts[at] = (this.#counts[at] as number) | EXCLUSIVE;
    return before === 0;
  }

  /** Counts one reference to a cluster that compressed clusters may share. */
  addShared(cluster: number): boolean {
    if (this.#isElsewhere(cluster)) return true;
    const at = cluster - this.start;
    this.#count(at);
    return ((this.#counts[at] as number) & EXCLUSIVE) === 0;
  }

  /** The number of references to a cluster of the window. */
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
