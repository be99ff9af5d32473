// SPDX-License-Identifier: AGPL-3.0-or-later
// Tells which part of the guest is safely in the file: guest order and file order are the same.

/** Steps smaller than this are joined, which bounds the list. */
const STEP_BYTES = 64 * 1024;

interface Step {
  guestEnd: number;
  fileEnd: number;
}

/** Pairs of positions: once the file has been written up to `fileEnd`, the guest is safe up to `guestEnd`. */
export class Watermark {
  readonly #steps: Step[] = [];
  #guestEnd = 0;

  /** All guest data below `guestEnd` is laid out in the file below `fileEnd`. Both ascend. */
  add(guestEnd: number, fileEnd: number): void {
    const last = this.#steps.at(-1);
    if (last !== undefined && Math.floor(last.fileEnd / STEP_BYTES) === Math.floor(fileEnd / STEP_BYTES)) {
      last.guestEnd = guestEnd;
      last.fileEnd = fileEnd;
    } else {
      this.#steps.push({ guestEnd, fileEnd });
    }
  }

  /** The guest offset below which everything is safe, now that the file has been written up to `writtenBelow`. */
  guestEnd(writtenBelow: number): number {
    let passed = 0;
    for (const step of this.#steps) {
      if (step.fileEnd > writtenBelow) break;
      this.#guestEnd = step.guestEnd;
      passed++;
    }
    this.#steps.splice(0, passed);
    return this.#guestEnd;
  }
}
