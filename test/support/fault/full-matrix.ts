// SPDX-License-Identifier: AGPL-3.0-or-later
// What FAULT_MATRIX=full changes: every place of a fault gets every signal, or every errno.

export const isFull = process.env.FAULT_MATRIX === "full";

/** Far above what a test of the matrix needs: it ends only what hangs. */
export const MATRIX_TIMEOUT_MS = isFull ? 3_600_000 : 600_000;

/** All of them in the full matrix; otherwise one, each in its turn. */
export const someOf = <T>(all: readonly T[], turn: number): readonly T[] =>
  all.filter((_, n) => isFull || n === turn % all.length);
