// SPDX-License-Identifier: AGPL-3.0-or-later
// Digests of open files, by name of the algorithm, and whether a file still has the one that was recorded.
import { environmentError, MIB } from "../core/index.ts";
import { type RegularFile, readInto } from "../host/index.ts";
import { type Digest, type Digester, mustCreateDigester } from "./digest.ts";

type OpenFile = Pick<RegularFile, "handle" | "path">;

/** Half-open range of a file in bytes; without `end` up to the end of the file. */
export interface FileRange {
  readonly start: number;
  readonly end?: number;
}

/** From the first byte to the last, as xxhsum and sha256sum do. */
const WHOLE: readonly FileRange[] = [{ start: 0 }];
const READ_BYTES = 4 * MIB;

/**
 * Digests a file, which is borrowed, range after range. Reads at explicit positions: the file's position does not move.
 *
 * @throws EnvironmentError if reading fails; the abort reason of `signal`
 */
export async function digestFile(
  file: OpenFile,
  digester: Digester,
  signal: AbortSignal,
  ranges = WHOLE,
): Promise<Digest> {
  const buffer = Buffer.allocUnsafe(READ_BYTES);
  for (const { start, end = Number.POSITIVE_INFINITY } of ranges) {
    for (let at = start; at < end; ) {
      signal.throwIfAborted();
      const target = buffer.subarray(0, Math.min(READ_BYTES, end - at));
      const got = await readInto(file.handle, target, at).catch((error: unknown) => {
        throw environmentError("read", file.path, error);
      });
      digester.update(target.subarray(0, got));
      if (got < target.length) break;
      at += got;
    }
  }
  return digester.finish();
}

/**
 * True if the digest of a file, which is borrowed, is still `expected`.
 *
 * @throws UnsupportedError if this system does not have the algorithm; as digestFile() does
 */
export async function verifyFile(
  file: OpenFile,
  expected: Digest,
  signal: AbortSignal,
  ranges = WHOLE,
): Promise<boolean> {
  const actual = await digestFile(file, mustCreateDigester(expected.algorithm, file.path), signal, ranges);
  return actual.value === expected.value;
}
