// SPDX-License-Identifier: AGPL-3.0-or-later
import { lstat } from "node:fs/promises";

/** True if the name exists; a symbolic link counts, wherever it leads. */
export async function exists(file: string): Promise<boolean> {
  return await lstat(file).then(
    () => true,
    () => false,
  );
}
