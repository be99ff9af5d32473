// SPDX-License-Identifier: AGPL-3.0-or-later
// The digest of one cluster of a disk: XXH3-128 under a random secret, so that no guest can aim at a collision.
// Source: xxhash.h, "XXH3_128bits_withSecret"; docs/store-format.md computes one by hand.
import { loadXxh3 } from "./digest.ts";

/** libxxhash wants at least 136. */
export const SECRET_BYTES = 192;
export const CLUSTER_DIGEST_BYTES = 16;

/** Writes the digest of `bytes`, big-endian as xxhsum prints it, to `target` from `at` on. */
export type ClusterDigester = (bytes: Buffer, target: Buffer, at: number) => void;

/** @returns undefined if this system has no libxxhash */
export function createClusterDigester(secret: Buffer): ClusterDigester | undefined {
  const library = loadXxh3();
  if (library === undefined) return undefined;
  return (bytes, target, at) => {
    const { low64, high64 } = library.withSecret(bytes, bytes.length, secret, secret.length);
    target.writeBigUInt64BE(BigInt(high64), at);
    target.writeBigUInt64BE(BigInt(low64), at + 8);
  };
}
