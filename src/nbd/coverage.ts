// SPDX-License-Identifier: AGPL-3.0-or-later
// Which bytes of a READ have arrived. If they come in order, as servers send them, this holds one piece.

import { MAX_READ_PIECES } from "./constants.ts";

interface Piece {
  start: number;
  end: number;
}

/** Half-open pieces, ascending, never touching. */
export class Coverage {
  readonly #pieces: Piece[] = [];
  #coveredBytes = 0;

  get coveredBytes(): number {
    return this.#coveredBytes;
  }

  /** Adds [start, end); false if one of its bytes was there before, or there are too many pieces. */
  add(start: number, end: number): boolean {
    const index = this.#indexAfter(start);
    const before = this.#pieces[index - 1];
    const after = this.#pieces[index];
    if ((before !== undefined && before.end > start) || (after !== undefined && after.start < end)) return false;
    this.#coveredBytes += end - start;
    if (before !== undefined && before.end === start) {
      before.end = end;
      if (after !== undefined && after.start === end) {
        before.end = after.end;
        this.#pieces.splice(index, 1);
      }
    } else if (after !== undefined && after.start === end) {
      after.start = start;
    } else {
      this.#pieces.splice(index, 0, { start, end });
    }
    return this.#pieces.length <= MAX_READ_PIECES;
  }

  /** Index of the first piece that starts after `start`. */
  #indexAfter(start: number): number {
    let low = 0;
    let high = this.#pieces.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((this.#pieces[middle] as Piece).start <= start) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}
