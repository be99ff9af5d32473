// SPDX-License-Identifier: AGPL-3.0-or-later
// One image file of a point, looked at through one open handle: size, header, fingerprint of the header.
import { createHash } from "node:crypto";
import { environmentError, errnoOf, type HostError, messageOf } from "../core/index.ts";
import { decodeQcow2Header, type Qcow2Header } from "../qcow2/index.ts";
import { PointDamagedError } from "./errors.ts";
import { JsonProblem, openRegular } from "./json.ts";

/** Our writer's header cluster: everything a header says is in it. */
export const HEADER_BYTES = 64 * 1024;

export interface ImageFile {
  readonly fileBytes: number;
  readonly header: Qcow2Header;
  /** SHA-256 of the first 64 KiB, or of the whole file where it is shorter. */
  readonly headerSha256: string;
}

/**
 * Looks at an image. External data files, encryption and unknown features are refused by the decoder.
 *
 * @throws PointDamagedError if it is missing, no regular file, or no image we can use; EnvironmentError
 */
export async function readImageFile(path: string): Promise<ImageFile> {
  try {
    await using handle = await openRegular(path);
    const { size } = await handle.stat();
    const bytes = Buffer.alloc(Math.min(HEADER_BYTES, size));
    let filled = 0;
    while (filled < bytes.length) {
      const { bytesRead } = await handle.read(bytes, filled, bytes.length - filled, filled);
      if (bytesRead === 0) throw new JsonProblem("it became shorter while it was read");
      filled += bytesRead;
    }
    const headerSha256 = createHash("sha256").update(bytes).digest("hex");
    return { fileBytes: size, header: decodeQcow2Header(bytes, path), headerSha256 };
  } catch (error) {
    if (error instanceof JsonProblem) throw damagedFile(path, messageOf(error));
    if (errnoOf(error) === "ENOENT") throw damagedFile(path, "it is missing");
    if (errnoOf(error) !== undefined) throw environmentError("read", path, error);
    throw new PointDamagedError(messageOf(error), { cause: error });
  }
}

/** What reading a file of a point threw, for the caller: no file of ours is damage, the rest the system's. */
export function unreadableFile(path: string, error: unknown): HostError {
  return error instanceof JsonProblem ? damagedFile(path, messageOf(error)) : environmentError("read", path, error);
}

export function damagedFile(path: string, state: string): PointDamagedError {
  return new PointDamagedError(`Cannot use "${path}": ${state}`);
}
