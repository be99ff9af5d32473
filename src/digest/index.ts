// SPDX-License-Identifier: AGPL-3.0-or-later

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
