// SPDX-License-Identifier: AGPL-3.0-or-later
// Digests of archive files: XXH3-128 where the system has libxxhash (12 GB/s here), otherwise SHA-256.
import { createHash } from "node:crypto";
import { UnsupportedError } from "../core/index.ts";
import { loadKoffi, loadNativeLibrary } from "../host/index.ts";

/** "xxh3-128" gives what `xxhsum -H2` prints; "sha256" gives what `sha256sum` prints. */
export type DigestAlgorithm = "xxh3-128" | "sha256";

/** As recorded in manifests: the algorithm's name, the value in lower-case hex. */
export interface Digest {
  readonly algorithm: DigestAlgorithm;
  readonly value: string;
}

/** A streaming digest. `update()` borrows its bytes only for the call. */
export interface Digester {
  readonly algorithm: DigestAlgorithm;
  update(bytes: Uint8Array): void;
  /** Completes the digest; the digester must not be used again. */
  finish(): Digest;
}

/** Loads the library of the fastest algorithm now instead of with the first digest. */
export function loadDigestLibrary(): void {
  loadXxh3();
}

/** The fastest algorithm this system has. */
export function preferredDigest(): DigestAlgorithm {
  return loadXxh3() === undefined ? "sha256" : "xxh3-128";
}

/**
 * Starts a digest.
 *
 * @returns undefined if `algorithm` is "xxh3-128" and this system has no libxxhash
 */
export function tryCreateDigester(algorithm: DigestAlgorithm): Digester | undefined {
  if (algorithm === "sha256") return createSha256();
  const library = loadXxh3();
  return library === undefined ? undefined : createXxh3(library);
}

/** Starts the digest that verifies `path`. @throws UnsupportedError where tryCreateDigester() returns undefined */
export function mustCreateDigester(algorithm: DigestAlgorithm, path: string): Digester {
  const digester = tryCreateDigester(algorithm);
  if (digester !== undefined) return digester;
  throw new UnsupportedError(`Cannot verify "${path}": this system has no ${algorithm}`, {
    hint: "install the package libxxhash0",
  });
}

function createSha256(): Digester {
  const hash = createHash("sha256");
  return {
    algorithm: "sha256",
    update: (bytes) => void hash.update(bytes),
    finish: () => ({ algorithm: "sha256", value: hash.digest("hex") }),
  };
}

interface Xxh3Hash {
  readonly low64: bigint | number;
  readonly high64: bigint | number;
}

interface Xxh3Library {
  readonly createState: () => unknown;
  readonly freeState: (state: unknown) => number;
  readonly reset: (state: unknown) => number;
  readonly update: (state: unknown, bytes: Uint8Array, length: number) => number;
  readonly digest: (state: unknown) => Xxh3Hash;
  readonly withSecret: (bytes: Uint8Array, length: number, secret: Uint8Array, secretLength: number) => Xxh3Hash;
}

let xxh3: Xxh3Library | null | undefined;

/** @returns undefined if this system has no libxxhash */
export function loadXxh3(): Xxh3Library | undefined {
  if (xxh3 === undefined) xxh3 = bindXxh3() ?? null;
  return xxh3 ?? undefined;
}

/** Source: xxhash.h, "XXH3 128-bit streaming" and XXH3_128bits_withSecret(). */
function bindXxh3(): Xxh3Library | undefined {
  const library = loadNativeLibrary("libxxhash.so.0");
  const koffi = loadKoffi();
  if (library === undefined || koffi === undefined) return undefined;
  koffi.struct("XXH128_hash_t", { low64: "uint64_t", high64: "uint64_t" });
  return {
    createState: library.func("void *XXH3_createState()"),
    freeState: library.func("int XXH3_freeState(void *state)"),
    reset: library.func("int XXH3_128bits_reset(void *state)"),
    update: library.func("int XXH3_128bits_update(void *state, const void *bytes, size_t length)"),
    digest: library.func("XXH128_hash_t XXH3_128bits_digest(const void *state)"),
    withSecret: library.func(
      "XXH128_hash_t XXH3_128bits_withSecret(const void *bytes, size_t length, const void *secret, size_t secretLength)",
    ),
  } as unknown as Xxh3Library;
}

function createXxh3(library: Xxh3Library): Digester {
  const state = library.createState();
  library.reset(state);
  return {
    algorithm: "xxh3-128",
    update: (bytes) => void library.update(state, bytes, bytes.byteLength),
    finish: () => {
      const { high64, low64 } = library.digest(state);
      library.freeState(state);
      const hex = (half: bigint | number): string => BigInt(half).toString(16).padStart(16, "0");
      return { algorithm: "xxh3-128", value: hex(high64) + hex(low64) };
    },
  };
}
