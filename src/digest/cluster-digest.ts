// SPDX-License-Identifier: AGPL-3.0-or-later
// The digest of one cluster of a disk: XXH3-128 under a random secret, so that no guest can aim at a collision.
// Source: xxhash.h, "XXH3_128bits_withSecret"; docs/store-format.md computes one by hand.
import { loadKoffi, loadNativeLibrary } from "../host/index.ts";

/** libxxhash wants at least 136. */
export const SECRET_BYTES = 192;
export const CLUSTER_DIGEST_BYTES = 16;

/** Writes the digest of `bytes`, big-endian as xxhsum prints it, to `target` from `at` on. */
export type ClusterDigester = (bytes: Buffer, target: Buffer, at: number) => void;

type Xxh3WithSecret = (
  bytes: Uint8Array,
  length: number,
  secret: Uint8Array,
  secretLength: number,
) => { readonly low64: bigint | number; readonly high64: bigint | number };

let xxh3: Xxh3WithSecret | null | undefined;

function loadXxh3(): Xxh3WithSecret | undefined {
  if (xxh3 === undefined) xxh3 = bindXxh3() ?? null;
  return xxh3 ?? undefined;
}

function bindXxh3(): Xxh3WithSecret | undefined {
  const library = loadNativeLibrary("libxxhash.so.0");
  const koffi = loadKoffi();
  if (library === undefined || koffi === undefined) return undefined;
  koffi.struct("ClusterDigest", { low64: "uint64_t", high64: "uint64_t" });
  return library.func(
    "ClusterDigest XXH3_128bits_withSecret(const void *bytes, size_t length, const void *secret, size_t secretLength)",
  ) as unknown as Xxh3WithSecret;
}

/** @returns undefined if this system has no libxxhash */
export function createClusterDigester(secret: Buffer): ClusterDigester | undefined {
  const digest = loadXxh3();
  if (digest === undefined) return undefined;
  return (bytes, target, at) => {
    const { low64, high64 } = digest(bytes, bytes.length, secret, secret.length);
    target.writeBigUInt64BE(BigInt(high64), at);
    target.writeBigUInt64BE(BigInt(low64), at + 8);
  };
}
