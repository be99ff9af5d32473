// SPDX-License-Identifier: AGPL-3.0-or-later
// Digests of files: XXH3-128 from the system's libxxhash, otherwise SHA-256, each by the name that is recorded with it.
// qcow2 knows in which order an image's bytes are digested; callers decide what is compared and what a mismatch means.
export {
  type Digest,
  type Digester,
  loadDigestLibrary,
  preferredDigest,
  tryCreateDigester,
} from "./digest.ts";
export { digestFile, type FileRange, verifyFile } from "./digest-file.ts";
