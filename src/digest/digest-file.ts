// SPDX-License-Identifier: AGPL-3.0-or-later
// The digest of a file in plain order, from the first byte to the last, as xxhsum and sha256sum compute it.
import type { FileHandle } from "node:fs/promises";
import { MIB } from "../core/index.ts";
import type { Digest, Digester } from "./digest.ts";

const READ_BYTES = 4 * MIB;

/** Reads at explicit positions: the file's position does not move. @throws the error of a read; the abort reason */
export async function digestFile(file: FileHandle, digester: Digester, signal: AbortSignal): Promise<Digest> {
  const buffer = Buffer.allocUnsafe(READ_BYTES);
  for (let at = 0; ; ) {
    signal.throwIfAborted();
    const { bytesRead } = await file.read(buffer, 0, buffer.length, at);
    if (bytesRead === 0) return digester.finish();
    digester.update(buffer.subarray(0, bytesRead));
    at += bytesRead;
  }
}
