// SPDX-License-Identifier: AGPL-3.0-or-later
// Digests of files: XXH3-128 from the system's libxxhash, else SHA-256, each by the name that is recorded with it.
// In which order an image's bytes are digested is known to qcow2; what is compared, and what a mismatch means, is
// for the callers to decide.
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
