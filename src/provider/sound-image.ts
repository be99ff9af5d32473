// SPDX-License-Identifier: AGPL-3.0-or-later
// The tables of an image, read before anybody relies on them: a lost table reads as zeroes, silently.
import { HostError } from "../core/index.ts";
import { checkQcow2 } from "../qcow2/index.ts";

/** The tables of an image contradict each other. Its size and header alone would not tell. */
export class ImageDamagedError extends HostError {
  override readonly code = "POINT_DAMAGED";
}

/**
 * Reads the tables of an image that we wrote: it had neither errors nor leaks then, and a lost table shows as leaks.
 *
 * @param act begins the sentence: `Cannot <act>: ...`
 * @throws ImageDamagedError, Qcow2FormatError, EnvironmentError, the reason of `signal`
 */
export async function assertSound(act: string, path: string, signal: AbortSignal): Promise<void> {
  const { errors, errorCount, leakedClusters } = await checkQcow2(path, { signal });
  if (errorCount === 0 && leakedClusters === 0) return;
  const state = errors[0] ?? `${leakedClusters} clusters belong to no table`;
  throw new ImageDamagedError(`Cannot ${act}: the tables of "${path}" are damaged: ${state}`, {
    hint: "check the health of the storage",
  });
}
