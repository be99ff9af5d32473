// SPDX-License-Identifier: AGPL-3.0-or-later
// What follows the fixed header in the first cluster: extensions and the backing file name.
import { Extension, HeaderField, MAX_BACKING_FILE_BYTES, MAX_BACKING_FORMAT_BYTES } from "./constants.ts";
import { Qcow2FormatError } from "./errors.ts";

/** A backing file as the header names it. This library never opens that name. */
export interface BackingReference {
  readonly file: string;
  /** undefined if the header does not state the format. */
  readonly format: string | undefined;
}

/** Makes the error for a header field, with the path in it. */
export type Fail = (state: string) => Qcow2FormatError;
export const failure =
  (path: string): Fail =>
  (state) =>
    new Qcow2FormatError(`Cannot use image "${path}": ${state}`);

/** type u32 | length u32 | data, padded to 8 bytes. */
export function encodeExtension(type: number, data: Buffer): Buffer {
  const bytes = Buffer.alloc(8 + Math.ceil(data.length / 8) * 8);
  bytes.writeUInt32BE(type, 0);
  bytes.writeUInt32BE(data.length, 4);
  data.copy(bytes, 8);
  return bytes;
}

interface Extensions {
  readonly backingFormat: string | undefined;
  readonly hasBitmaps: boolean;
  readonly hasFeatureNames: boolean;
}

/** Walks the extensions from `start` to the backing file name or the end of the cluster. */
export function decodeExtensions(bytes: Buffer, start: number, clusterBytes: number, fail: Fail): Extensions {
  const nameOffset = bytes.readBigUInt64BE(HeaderField.backingFileOffset);
  const limit = Math.min(bytes.length, clusterBytes, nameOffset === 0n ? clusterBytes : Number(nameOffset));
  let backingFormat: string | undefined;
  let hasBitmaps = false;
  let hasFeatureNames = false;
  for (let at = start; at + 8 <= limit; ) {
    const type = bytes.readUInt32BE(at);
    const length = bytes.readUInt32BE(at + 4);
    if (length > limit - at - 8) throw fail(`its header extension 0x${type.toString(16)} overruns the header`);
    if (type === Extension.end) break;
    if (type === Extension.externalDataFile) throw fail("it names an external data file");
    if (type === Extension.bitmaps) hasBitmaps = true;
    if (type === Extension.featureNames) hasFeatureNames = true;
    if (type === Extension.backingFormat) {
      if (length > MAX_BACKING_FORMAT_BYTES) throw fail(`its backing format has ${length} bytes`);
      backingFormat = decodeName(bytes.subarray(at + 8, at + 8 + length), "backing format", fail);
    }
    at += 8 + Math.ceil(length / 8) * 8;
  }
  return { backingFormat, hasBitmaps, hasFeatureNames };
}

/** The backing file, if the header names one. Source: "backing_file_offset". */
export function decodeBacking(
  bytes: Buffer,
  format: string | undefined,
  clusterBytes: number,
  fail: Fail,
): BackingReference | undefined {
  const position = bytes.readBigUInt64BE(HeaderField.backingFileOffset);
  if (position === 0n) return undefined;
  const length = bytes.readUInt32BE(HeaderField.backingFileBytes);
  if (length > MAX_BACKING_FILE_BYTES) throw fail(`its backing file name has ${length} bytes`);
  if (position > BigInt(clusterBytes)) throw fail("its backing file name is not in the first cluster");
  const offset = Number(position);
  if (offset + length > Math.min(clusterBytes, bytes.length)) throw fail("its backing file name overruns the header");
  if (length === 0) return undefined;
  return { file: decodeName(bytes.subarray(offset, offset + length), "backing file name", fail), format };
}

function decodeName(bytes: Buffer, what: string, fail: Fail): string {
  if (bytes.includes(0)) throw fail(`its ${what} contains a NUL byte`);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw fail(`its ${what} is not UTF-8`);
  }
}
