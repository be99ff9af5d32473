// SPDX-License-Identifier: AGPL-3.0-or-later
// qcow2 images, a library in its own right (docs/qcow2-library.md): a writer that appends in guest order, a reader
// of single images and of chains, a checker of their tables. It does not trust images, and never opens a file by a
// name in a header. store knows where images are and which of them form a chain.
export { Qcow2Chain } from "./chain.ts";
export { checkQcow2 } from "./check.ts";
export { type ClusterCompressor, createCompressor } from "./compressor.ts";
export { DIGEST_ORDER } from "./digest-order.ts";
export { Qcow2FormatError } from "./errors.ts";
export { decodeQcow2Header, isAppendedImage, type Qcow2Header } from "./header.ts";
export type { Compression } from "./plan-shape.ts";
export { Qcow2Writer } from "./writer.ts";
