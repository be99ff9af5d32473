// SPDX-License-Identifier: AGPL-3.0-or-later
// Whether an archive still is what was recorded of it.

import { environmentError } from "../core/index.ts";
import { type Digest, digestFile, mustCreateDigester } from "../digest/index.ts";
import type { RegularFile } from "../host/index.ts";

/**
 * Compares a file, which is borrowed, with a digest that was taken of it in plain order.
 *
 * @throws UnsupportedError if this system lacks the algorithm; EnvironmentError if the file cannot be read; the abort
 *   reason of `signal`
 */
export async function verifyArchive(file: RegularFile, expected: Digest, signal: AbortSignal): Promise<boolean> {
  const digester = mustCreateDigester(expected.algorithm, file.path);
  const actual = await digestFile(file.handle, digester, signal).catch((error: unknown) => {
    signal.throwIfAborted();
    throw environmentError("read", file.path, error);
  });
  return actual.value === expected.value;
}
