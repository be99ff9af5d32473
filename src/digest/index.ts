// SPDX-License-Identifier: AGPL-3.0-or-later
// Digests of files: XXH3-128 from the system's libxxhash, otherwise SHA-256, each by the name that is recorded with it.
// Digests of the clusters of a disk, in files of their own beside the images; without libxxhash there are none.
// qcow2 knows in which order an image's bytes are digested; callers decide what is compared and what a mismatch means.
export { BlockDigestFile } from "./block-file.ts";
export { BlockDigestWriter } from "./block-writer.ts";
export { ChainDigests, type ClusterState } from "./chain-digests.ts";
export {
  CLUSTER_DIGEST_BYTES,
  type ClusterDigester,
  createClusterDigester,
  SECRET_BYTES,
} from "./cluster-digest.ts";
export {
  type Digest,
  type Digester,
  loadDigestLibrary,
  preferredDigest,
  tryCreateDigester,
} from "./digest.ts";
export { digestFile, type FileRange, verifyFile } from "./digest-file.ts";
