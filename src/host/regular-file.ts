// SPDX-License-Identifier: AGPL-3.0-or-later
// Regular files, opened once and read through the descriptor: what was checked is what is read. Links, pipes and
// devices that someone put in a file's place are refused.
import { constants } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { environmentError } from "../core/index.ts";

/** Says in a clause why what was found cannot be used: "it is not a regular file". The caller words the error. */
export class FileProblem extends Error {}

/** O_NONBLOCK: opening a pipe that someone put there must not hang. */
export const READ_FLAGS = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;

/** Which file or directory it is, whatever its name is now. */
export interface FileIdentity {
  readonly dev: bigint;
  readonly ino: bigint;
}

export function isSameFile(a: FileIdentity, b: FileIdentity): boolean {
  return a.dev === b.dev && a.ino === b.ino;
}

/** A regular file open for reading. */
export interface RegularFile extends AsyncDisposable {
  /** For messages: it is never used to open the file again. */
  readonly path: string;
  readonly handle: FileHandle;
  /** Size when it was opened. */
  readonly fileBytes: number;
  /** How many names it had when it was opened: with more than one it may be another user's file. */
  readonly links: number;
}

/**
 * Opens a regular file by a path that only we can change.
 *
 * @throws FileProblem if it is a link or not a regular file; the system's error if it cannot be opened
 */
export async function openRegularFile(path: string): Promise<RegularFile> {
  return await toRegularFile(path, () => open(path, READ_FLAGS));
}

/** The same for callers that open it in another way. @param path for messages */
export async function toRegularFile(path: string, openIt: () => Promise<FileHandle>): Promise<RegularFile> {
  const handle = await openIt().catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ELOOP") throw new FileProblem("it is a symbolic link, not a file");
    if (error.code === "EISDIR") throw new FileProblem("it is a directory, not a file"); // opened for writing
    if (error.code === "ENXIO") throw new FileProblem("it is a socket, not a file");
    throw error;
  });
  try {
    const found = await handle.stat();
    if (found.isDirectory()) throw new FileProblem("it is a directory, not a file");
    if (found.isFIFO()) throw new FileProblem("it is a named pipe, not a file");
    if (!found.isFile()) throw new FileProblem("it is a device, not a file");
    return { path, handle, fileBytes: found.size, links: found.nlink, [Symbol.asyncDispose]: () => handle.close() };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/**
 * Fills `target` from `offset` on, also if the kernel returns less at once; stops at the end of the file. Throws the
 * system's error.
 *
 * @returns how many bytes were read
 */
export async function readInto(handle: FileHandle, target: Buffer, offset: number): Promise<number> {
  let done = 0;
  while (done < target.length) {
    const { bytesRead } = await handle.read(target, done, target.length - done, offset + done);
    if (bytesRead === 0) break;
    done += bytesRead;
  }
  return done;
}

/**
 * Reads a whole file of at most `maxBytes`.
 *
 * @throws FileProblem if it is larger or gets shorter meanwhile; the system's error
 */
export async function readWhole({ handle, fileBytes }: RegularFile, maxBytes: number): Promise<Buffer> {
  if (fileBytes > maxBytes) throw new FileProblem(`it is larger than ${maxBytes} bytes`);
  const bytes = Buffer.alloc(fileBytes);
  if ((await readInto(handle, bytes, 0)) < fileBytes) throw new FileProblem("it became shorter while it was read");
  return bytes;
}

/** Reads a whole file by a path that only we can change. @throws as openRegularFile() and readWhole() */
export async function readRegularFile(path: string, maxBytes: number): Promise<Buffer> {
  await using file = await openRegularFile(path);
  return await readWhole(file, maxBytes);
}

/** A file that is about to be created; the implementation knows where. */
export interface NewFile {
  /** For messages. */
  readonly path: string;
  /** Creates it, empty, for reading and writing; the name must be free. Throws the system's error. */
  create(): Promise<FileHandle>;
  /** Removes its name, whatever has that name by then. */
  remove(): Promise<void>;
}

/** Opens the file of a descriptor once more, with separate flags; its name is not used. */
export async function reopen(handle: FileHandle, flags: number): Promise<FileHandle> {
  return await open(`/proc/self/fd/${handle.fd}`, flags);
}

/**
 * Opens a file again, only for reading and with its own position: for a program that inherits it. The program moves the
 * position as it reads, and must not write even if the first open allows it. The caller closes it.
 *
 * @throws EnvironmentError
 */
export async function openAgain({ handle, path }: RegularFile): Promise<FileHandle> {
  if (handle.fd < 0) throw new Error(`"${path}" is closed`);
  try {
    return await reopen(handle, constants.O_RDONLY);
  } catch (error) {
    throw environmentError("read", path, error);
  }
}

/** Tells one state of a file from another: a change of its content or its size changes this, too. */
export interface FileStamp extends FileIdentity {
  readonly size: bigint;
  readonly mtimeNs: bigint;
  readonly ctimeNs: bigint;
}

/** The stamp of a file that was opened a moment ago. */
export async function readStamp(handle: FileHandle): Promise<FileStamp> {
  const { dev, ino, size, mtimeNs, ctimeNs } = await handle.stat({ bigint: true });
  return { dev, ino, size, mtimeNs, ctimeNs };
}

/** The stamp of a file that has been open for a while. It is opened again: only that asks the server of a share. */
export async function readStampAgain(handle: FileHandle): Promise<FileStamp> {
  await using again = await reopen(handle, constants.O_RDONLY | constants.O_NONBLOCK);
  return await readStamp(again);
}

/** One stamp as text; only the same state gives the same text. */
export function formatStamp({ dev, ino, size, mtimeNs, ctimeNs }: FileStamp): string {
  return [dev, ino, size, mtimeNs, ctimeNs].join(":");
}
