// SPDX-License-Identifier: AGPL-3.0-or-later
// A second open of a file that is open already: the same file, whatever its name leads to by now.
import { constants } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { environmentError } from "../core/index.ts";
import type { RegularFile } from "./regular-file.ts";

/**
 * Opens a file again, only for reading and with a position of its own: for a program that inherits it. It moves the
 * position as it reads, and shall not write even where the first open allows it. The caller closes it.
 *
 * @throws EnvironmentError
 */
export async function openAgain({ handle, path }: RegularFile): Promise<FileHandle> {
  if (handle.fd < 0) throw new Error(`"${path}" is closed`);
  try {
    return await open(`/proc/self/fd/${handle.fd}`, constants.O_RDONLY);
  } catch (error) {
    throw environmentError("read", path, error);
  }
}
