// SPDX-License-Identifier: AGPL-3.0-or-later
// Folders and files below /run that are Proxmox VE's as much as ours. Its programs make them under root's usual umask
// and never look at the mode again; the bridge's umask is 077. Whoever comes first, they come out the same.
import { chmod, mkdir, open } from "node:fs/promises";
import path from "node:path";
import { errnoOf } from "../core/index.ts";

const FOLDER_MODE = 0o755;
const FILE_MODE = 0o644;

/** Makes `folder`, an absolute path, and what is missing above it. What is there stays as it is. */
export async function makePublicFolder(folder: string): Promise<void> {
  const first = await mkdir(folder, { recursive: true });
  if (first === undefined) return;
  for (let made = folder; made.length >= first.length; made = path.dirname(made)) await chmod(made, FOLDER_MODE);
}

/** Makes `file`, empty, and its folder. What is there stays as it is. */
export async function makePublicFile(file: string): Promise<void> {
  await makePublicFolder(path.dirname(file));
  try {
    await using handle = await open(file, "wx");
    await handle.chmod(FILE_MODE);
  } catch (error) {
    if (errnoOf(error) !== "EEXIST") throw error;
  }
}

/** Lets everybody read a file that we made. */
export async function makePublic(file: string): Promise<void> {
  await chmod(file, FILE_MODE);
}
