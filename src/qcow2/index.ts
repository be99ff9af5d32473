// SPDX-License-Identifier: AGPL-3.0-or-later
export { Qcow2Chain } from "./chain.ts";
export { checkQcow2 } from "./check.ts";
export { type ClusterCompressor, createCompressor } from "./compressor.ts";
export { verifyDigest } from "./digest-file.ts";
export { Qcow2FormatError } from "./errors.ts";
export { decodeQcow2Header, isAppendedImage, type Qcow2Header } from "./header.ts";
export type { Compression } from "./plan-shape.ts";
export { Qcow2Writer } from "./writer.ts";
