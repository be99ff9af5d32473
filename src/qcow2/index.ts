// SPDX-License-Identifier: AGPL-3.0-or-later
export { Qcow2Chain } from "./chain.ts";
export { type CheckOptions, checkQcow2 } from "./check.ts";
export type { CheckReport } from "./check-report.ts";
export type { CompressionKind } from "./compress-protocol.ts";
export { type ClusterCompressor, type CompressedRun, createCompressor } from "./compressor.ts";
export { digestQcow2File, verifyDigest } from "./digest-file.ts";
export { Qcow2FormatError } from "./errors.ts";
export { decodeQcow2Header, isAppendedImage, type Qcow2Header } from "./header.ts";
export type { BackingReference } from "./header-extensions.ts";
export { readQcow2Header } from "./read-header.ts";
export { type Compression, type Qcow2Summary, Qcow2Writer, type Qcow2WriterOptions } from "./writer.ts";
