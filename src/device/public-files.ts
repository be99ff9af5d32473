// SPDX-License-Identifier: AGPL-3.0-or-later
// Directories and files below /run that Proxmox VE uses as much as we do. Its programs create them under root's usual
// umask and never check the mode again; the bridge's umask is 077. They come out the same whichever program is first.
import { chmod, mkdir, open } from "node:fs/promises";
import path from "node:path";
import { errnoOf } from "../core/index.ts";

const FOLDER_MODE = 0o755;
const FILE_MODE = 0o644;

/** Creates `folder`, an absolute path, and what is missing above it. What exists stays as it is. */
export async function makePublicFolder(folder: string): Promise<void> {
  const first = await mkdir(folder, { recursive: true });
  if (first === undefined) return;
  for (let made = folder; made.length >= first.length; made = path.dirname(made)) await chmod(made, FOLDER_MODE);
}

/** Creates `file`, empty, and its directory. What exists stays as it is. */
export async function makePublicFile(file: string): Promise<void> {
  await makePublicFolder(path.dirname(file));
  try {
    await using handle = await open(file, "wx");
    await handle.chmod(FILE_MODE);
  } catch (error) {
    if (errnoOf(error) !== "EEXIST") throw error;
  }
}

/** Lets all users read a file that we created. */
export async function makePublic(file: string): Promise<void> {
  await chmod(file, FILE_MODE);
}
