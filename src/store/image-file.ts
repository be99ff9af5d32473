// SPDX-License-Identifier: AGPL-3.0-or-later
// One image file of a point, opened once: size, header, fingerprint of the header. Its tables and its data are read
// later through the same descriptor.
import { createHash } from "node:crypto";
import { environmentError, errnoOf, type HostError, messageOf } from "../core/index.ts";
import {
  FileProblem,
  type FileStamp,
  type Folder,
  formatStamp,
  type RegularFile,
  readInto,
  readStamp,
  readStampAgain,
} from "../host/index.ts";
import { decodeQcow2Header, type Qcow2Header } from "../qcow2/index.ts";
import { PointDamagedError } from "./errors.ts";

/** Our writer's header cluster: everything a header says is in it. */
const HEADER_BYTES = 64 * 1024;

/** An image, open until it is disposed. */
export interface ImageFile extends AsyncDisposable {
  readonly file: RegularFile;
  /** The file as it was when its header was read. */
  readonly stamp: FileStamp;
  readonly header: Qcow2Header;
  /** SHA-256 of the first 64 KiB, or of the whole file where it is shorter. */
  readonly headerSha256: string;
}

/**
 * Opens an image of a point. External data files, encryption and unknown features are refused by the decoder.
 *
 * @throws PointDamagedError if it is missing, not a regular file, or not an image we can use; EnvironmentError
 */
export async function openImageFile(folder: Folder, name: string): Promise<ImageFile> {
  const path = folder.pathOf(name);
  let file: RegularFile | undefined;
  try {
    file = await folder.openFile(name);
    const stamp = await readStamp(file.handle); // before the header: what changes it from now on changes the stamp
    const bytes = await readHead(file);
    const headerSha256 = createHash("sha256").update(bytes).digest("hex");
    const header = decodeQcow2Header(bytes, path);
    const { handle } = file;
    return { file, stamp, header, headerSha256, [Symbol.asyncDispose]: () => handle.close() };
  } catch (error) {
    await file?.[Symbol.asyncDispose]();
    if (error instanceof FileProblem) throw damagedFile(path, messageOf(error));
    if (errnoOf(error) === "ENOENT") throw damagedFile(path, "it is missing");
    if (errnoOf(error) !== undefined) throw environmentError("read", path, error);
    throw new PointDamagedError(messageOf(error), { cause: error });
  }
}

/**
 * What must be unchanged. "everything": also owner, mode and names, as no content can change without the inode's
 * time. "content": for hours in which others may make a hard link to the file, or protect it.
 */
export type Unchanged = "everything" | "content";

/** @throws PointDamagedError if the file is no longer what was opened and checked; EnvironmentError */
export async function assertUnchanged(
  { file, stamp }: Pick<ImageFile, "file" | "stamp">,
  what: Unchanged,
): Promise<void> {
  const now = await readStampAgain(file.handle).catch((error: unknown) => {
    throw environmentError("look at", file.path, error);
  });
  const relevant = what === "everything" ? now : { ...now, ctimeNs: stamp.ctimeNs };
  if (formatStamp(relevant) !== formatStamp(stamp)) {
    throw damagedFile(file.path, "it was changed while it was in use");
  }
}

async function readHead({ handle, fileBytes }: RegularFile): Promise<Buffer> {
  const bytes = Buffer.alloc(Math.min(HEADER_BYTES, fileBytes));
  if ((await readInto(handle, bytes, 0)) < bytes.length) throw new FileProblem("it became shorter while it was read");
  return bytes;
}

/**
 * For files without a recorded digest: a second name may be outside the store, and the file may not be ours.
 *
 * @throws FileProblem
 */
export function refuseShared({ links }: Pick<RegularFile, "links">): void {
  if (links > 1) throw new FileProblem(`it has ${links} names (hard links), and no digest of it is recorded`);
}

/**
 * Turns what reading a file of a point threw into the caller's error: a file that is not ours is damage, the rest is
 * the system's error.
 */
export function unreadableFile(path: string, error: unknown): HostError {
  return error instanceof FileProblem ? damagedFile(path, messageOf(error)) : environmentError("read", path, error);
}

export function damagedFile(path: string, state: string): PointDamagedError {
  return new PointDamagedError(`Cannot use "${path}": ${state}`);
}
