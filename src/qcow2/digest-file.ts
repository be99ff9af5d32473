// SPDX-License-Identifier: AGPL-3.0-or-later
// The digest of an image on disk, in the writer's order: from byte 65536 to the end, then the head.

import { MIB } from "../core/index.ts";
import { type Digest, type DigestAlgorithm, mustCreateDigester } from "../digest/index.ts";
import type { RegularFile } from "../host/index.ts";
import { HEAD_BYTES } from "./constants.ts";
import { readUpTo } from "./file-io.ts";

/**
 * Digests an open file of any kind: `(tail -c +65537 F; head -c 65536 F) | xxhsum -H2` prints the same value.
 *
 * @param onProgress called with the bytes read so far
 * @throws UnsupportedError if this system does not have the algorithm, EnvironmentError if reading fails
 */
export async function digestQcow2File(
  file: RegularFile,
  algorithm: DigestAlgorithm,
  signal: AbortSignal,
  onProgress?: (doneBytes: number) => void,
): Promise<Digest> {
  const digester = mustCreateDigester(algorithm, file.path);
  const buffer = Buffer.alloc(MIB);
  for (let at = HEAD_BYTES; ; ) {
    signal.throwIfAborted();
    const got = await readUpTo(file, buffer, at);
    if (got === 0) break;
    digester.update(buffer.subarray(0, got));
    at += got;
    onProgress?.(at - HEAD_BYTES);
  }
  const head = buffer.subarray(0, HEAD_BYTES);
  digester.update(head.subarray(0, await readUpTo(file, head, 0)));
  return digester.finish();
}

/** True if the file's digest is `expected`; throws as digestQcow2File() does. */
export async function verifyDigest(file: RegularFile, expected: Digest, signal: AbortSignal): Promise<boolean> {
  const actual = await digestQcow2File(file, expected.algorithm, signal);
  return actual.value === expected.value;
}
