// SPDX-License-Identifier: AGPL-3.0-or-later
// Digests of files: XXH3-128 from the system's libxxhash, otherwise SHA-256, each by the name that is recorded with it.
// qcow2 knows in which order an image's bytes are digested; callers decide what is compared and what a mismatch means.
export {
  type Digest,
  type DigestAlgorithm,
  type Digester,
  loadDigestLibrary,
  mustCreateDigester,
  preferredDigest,
  tryCreateDigester,
} from "./digest.ts";
export { digestFile } from "./digest-file.ts";
