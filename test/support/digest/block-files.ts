// SPDX-License-Identifier: AGPL-3.0-or-later
// Files of block digests, made and opened by name.
import { type FileHandle, open, rm } from "node:fs/promises";
import { BlockDigestFile } from "../../../src/digest/block-file.ts";
import { BlockDigestWriter } from "../../../src/digest/block-writer.ts";
import { createClusterDigester } from "../../../src/digest/cluster-digest.ts";
import type { Digest } from "../../../src/digest/index.ts";
import { openRegularFile } from "../../../src/host/index.ts";

export const UUID = "0f8fad5b-d9cb-469f-a165-70867728950e";
export const SECRET = Buffer.from(Array.from({ length: 192 }, (_, at) => (at * 73 + 5) & 255));

/** A cluster of data with its digest, or a run of zeroes. */
export type Defined =
  | { readonly cluster: number; readonly digest: Buffer }
  | { readonly cluster: number; readonly zeroes: number };

interface Header {
  readonly uuid?: string;
  readonly diskBytes?: number;
  readonly secret?: Buffer;
}

export async function createWriter(path: string, header: Header = {}): Promise<BlockDigestWriter> {
  const secret = header.secret ?? SECRET;
  const digester = createClusterDigester(secret);
  if (digester === undefined) throw new Error("this system has no libxxhash");
  const file = {
    path,
    create: async (): Promise<FileHandle> => await open(path, "wx+", 0o600),
    remove: async () => await rm(path, { force: true }),
  };
  const all = { uuid: UUID, diskBytes: 2 ** 40, ...header, secret };
  return await BlockDigestWriter.create(file, all, digester);
}

export async function writeBlockDigests(
  path: string,
  records: readonly Defined[],
  header: Header = {},
): Promise<{ readonly fileBytes: number; readonly digest: Digest }> {
  await using writer = await createWriter(path, header);
  for (const record of records) {
    if ("digest" in record) await writer.addData(record.cluster, record.digest);
    else await writer.addZeroes(record.cluster, record.zeroes);
  }
  return await writer.finish();
}

/** Open until it is disposed. */
export async function openBlockDigests(path: string): Promise<BlockDigestFile & AsyncDisposable> {
  const file = await openRegularFile(path);
  try {
    return Object.assign(await BlockDigestFile.open(file), {
      [Symbol.asyncDispose]: () => file[Symbol.asyncDispose](),
    });
  } catch (error) {
    await file[Symbol.asyncDispose]();
    throw error;
  }
}
