// SPDX-License-Identifier: AGPL-3.0-or-later
// Reads and writes that finish what the kernel did only in part.
import type { FileHandle } from "node:fs/promises";
import { environmentError } from "../core/index.ts";
import { type RegularFile, readInto } from "../host/index.ts";
import { Qcow2FormatError } from "./errors.ts";

/**
 * Fills `target` from `offset` on.
 *
 * @throws Qcow2FormatError if the file ends before, EnvironmentError if reading fails
 */
export async function readExactly(file: RegularFile, target: Buffer, offset: number): Promise<void> {
  const got = await readUpTo(file, target, offset);
  if (got < target.length) throw endsBefore(file, offset + got, offset, target.length);
}

function endsBefore(file: RegularFile, end: number, offset: number, wanted: number): Qcow2FormatError {
  return new Qcow2FormatError(
    `Cannot read "${file.path}": it ends at byte ${end}, expected ${wanted} bytes from byte ${offset} on`,
  );
}

/**
 * Reads a table whose position and length come from the file itself: allocates nothing for what does not exist.
 *
 * @throws Qcow2FormatError if the file ends before, EnvironmentError if reading fails
 */
export async function readTable(file: RegularFile, offset: number, length: number): Promise<Buffer> {
  if (offset + length > file.fileBytes) throw endsBefore(file, file.fileBytes, offset, length);
  const table = Buffer.alloc(length);
  await readExactly(file, table, offset);
  return table;
}

/** As readExactly(), but stops at the end of the file. Returns the number of bytes read. */
export async function readUpTo(file: RegularFile, target: Buffer, offset: number): Promise<number> {
  try {
    return await readInto(file.handle, target, offset);
  } catch (error) {
    throw environmentError("read", file.path, error);
  }
}

const NOTHING_WRITTEN = "the file system takes nothing more, and does not say why";

/** Writes all of `bytes` at `offset`; throws Node's error, or another one if the file accepts no more. */
export async function writeFully(handle: FileHandle, bytes: Buffer, offset: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const { bytesWritten } = await handle.write(bytes, done, bytes.length - done, offset + done);
    if (bytesWritten === 0) throw new Error(NOTHING_WRITTEN);
    done += bytesWritten;
  }
}

/** writeFully() for several pieces that follow each other in the file; in one call if the system accepts it. */
export async function writeAllFully(handle: FileHandle, pieces: readonly Buffer[], offset: number): Promise<void> {
  let rest = pieces.filter((piece) => piece.length > 0);
  let at = offset;
  while (rest.length > 0) {
    const { bytesWritten } = await handle.writev(rest, at);
    if (bytesWritten === 0) throw new Error(NOTHING_WRITTEN);
    at += bytesWritten;
    rest = withoutHead(rest, bytesWritten);
  }
}

function withoutHead(pieces: readonly Buffer[], bytes: number): Buffer[] {
  let skipped = 0;
  const rest: Buffer[] = [];
  for (const piece of pieces) {
    const cut = Math.min(piece.length, bytes - skipped);
    skipped += cut;
    if (cut < piece.length) rest.push(piece.subarray(cut));
  }
  return rest;
}
