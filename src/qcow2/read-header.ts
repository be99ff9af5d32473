// SPDX-License-Identifier: AGPL-3.0-or-later
import type { RegularFile } from "../host/index.ts";
import { HEADER_BYTES_V2 } from "./constants.ts";
import { readUpTo } from "./file-io.ts";
import { decodeClusterBits, decodeQcow2Header, type Qcow2Header } from "./header.ts";

/**
 * Reads and checks the header of an image; reads at most one cluster (2 MiB).
 *
 * @throws EnvironmentError if the file cannot be read, Qcow2FormatError as decodeQcow2Header() does
 */
export async function readQcow2Header(file: RegularFile): Promise<Qcow2Header> {
  const fixed = Buffer.alloc(HEADER_BYTES_V2);
  const got = await readUpTo(file, fixed, 0);
  const clusterBits = decodeClusterBits(fixed.subarray(0, got), file.path);
  const cluster = Buffer.alloc(Math.min(2 ** clusterBits, file.fileBytes));
  const length = await readUpTo(file, cluster, 0);
  return decodeQcow2Header(cluster.subarray(0, length), file.path);
}
