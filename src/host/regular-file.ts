// SPDX-License-Identifier: AGPL-3.0-or-later
// Regular files, opened once and read through the descriptor: what was looked at is what is read. Links, pipes
// and devices that somebody put in a file's place are refused.
import { constants } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";

/** Why something that was found cannot be used, as a clause: "it is not a regular file". The caller words the error. */
export class FileProblem extends Error {}

/** O_NONBLOCK: opening a pipe that somebody put there must not hang. */
export const READ_FLAGS = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;

/** Which file or folder it is, whatever its name is now. */
export interface FileIdentity {
  readonly dev: bigint;
  readonly ino: bigint;
}

export function isSameFile(a: FileIdentity, b: FileIdentity): boolean {
  return a.dev === b.dev && a.ino === b.ino;
}

/** A regular file open for reading. */
export interface RegularFile extends AsyncDisposable {
  /** For messages: nothing is opened by it again. */
  readonly path: string;
  readonly handle: FileHandle;
  /** Size when it was opened. */
  readonly fileBytes: number;
}

/**
 * Opens a regular file by a path that nobody else can change.
 *
 * @throws FileProblem if it is a link or not a regular file; the system's error if it cannot be opened
 */
export async function openRegularFile(path: string): Promise<RegularFile> {
  return await toRegularFile(path, () => open(path, READ_FLAGS));
}

/** The same for whoever opens it in another way. @param path for messages */
export async function toRegularFile(path: string, openIt: () => Promise<FileHandle>): Promise<RegularFile> {
  const handle = await openIt().catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ELOOP") throw new FileProblem("it is a symbolic link, not a file");
    // What open(2) says of a socket, and of a folder where it is opened for writing.
    if (error.code === "ENXIO" || error.code === "EISDIR") throw new FileProblem("it is not a regular file");
    throw error;
  });
  try {
    const found = await handle.stat();
    if (!found.isFile()) throw new FileProblem("it is not a regular file");
    return { path, handle, fileBytes: found.size, [Symbol.asyncDispose]: () => handle.close() };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/**
 * Reads all of a file of at most `maxBytes`.
 *
 * @throws FileProblem if it is larger or becomes shorter meanwhile; the system's error
 */
export async function readWhole({ handle, fileBytes }: RegularFile, maxBytes: number): Promise<Buffer> {
  if (fileBytes > maxBytes) throw new FileProblem(`it is larger than ${maxBytes} bytes`);
  const bytes = Buffer.alloc(fileBytes);
  let filled = 0;
  while (filled < fileBytes) {
    const { bytesRead } = await handle.read(bytes, filled, fileBytes - filled, filled);
    if (bytesRead === 0) throw new FileProblem("it became shorter while it was read");
    filled += bytesRead;
  }
  return bytes;
}

/** Reads a whole file by a path that nobody else can change. @throws as openRegularFile() and readWhole() */
export async function readRegularFile(path: string, maxBytes: number): Promise<Buffer> {
  await using file = await openRegularFile(path);
  return await readWhole(file, maxBytes);
}
