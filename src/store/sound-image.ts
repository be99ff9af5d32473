// SPDX-License-Identifier: AGPL-3.0-or-later
// Reads the tables of an image before anything relies on them: a lost table silently reads as zeroes.
import type { RegularFile } from "../host/index.ts";
import { checkQcow2, Qcow2FormatError, type Qcow2Header } from "../qcow2/index.ts";
import { PointDamagedError } from "./errors.ts";

/**
 * Reads the tables of an image of a point. Sound ones have neither errors nor leaks, whether we wrote them or the
 * upstream example did, which writes an image once and never frees anything. A cluster that is counted but belongs to
 * no table was written, and is lost.
 *
 * @param act begins the sentence: `Cannot <act>: ...`
 * @param header of this same file, if it was already read
 * @throws PointDamagedError; UnsupportedError if it cannot be determined whether they are sound; EnvironmentError;
 *   the reason of `signal`
 */
export async function assertSound(
  act: string,
  file: RegularFile,
  signal: AbortSignal,
  header?: Qcow2Header,
): Promise<void> {
  const { errors, errorCount, leakedClusters } = await checkQcow2(
    file,
    header === undefined ? { signal } : { signal, header },
  ).catch((error: unknown) => {
    if (error instanceof Qcow2FormatError) throw new PointDamagedError(error.message, { cause: error });
    throw error;
  });
  if (errorCount === 0 && leakedClusters === 0) return;
  const state = errors[0] ?? `${leakedClusters} clusters belong to no table`;
  throw new PointDamagedError(`Cannot ${act}: the tables of "${file.path}" are damaged: ${state}`, {
    hint: "check the health of the storage; 'qemu-img check -r' would give up what is lost",
  });
}
