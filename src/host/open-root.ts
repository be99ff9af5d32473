// SPDX-License-Identifier: AGPL-3.0-or-later
// The directory that a storage's path leads to. The administrator chose the path, and links in it are followed as long
// as they are the administrator's, too: one on a network share, or in another user's directory, may be anyone's.
import { constants } from "node:fs";
import { type FileHandle, open, readlink, statfs } from "node:fs/promises";
import { errnoOf } from "../core/index.ts";
import { FileProblem } from "./regular-file.ts";

const FOLDER_FLAGS = constants.O_RDONLY | constants.O_DIRECTORY;
/**
 * Enough to continue from it: a directory on the way need not be readable. Source: Linux,
 * include/uapi/asm-generic/fcntl.h.
 */
const O_PATH = 0o10_000_000;
const WAY_FLAGS = O_PATH | constants.O_DIRECTORY;
/** As many as the kernel follows. Source: path_resolution(7). */
const MAX_LINKS = 40;

/** f_type of file systems that other hosts write to. Source: statfs(2) and linux/magic.h. */
const NETWORK_TYPES: ReadonlySet<number> = new Set([
  0x6969, // NFS
  0xff534d42, // CIFS
  0xfe534d42, // SMB2
  0x517b, // SMB
  0x00c36400, // CephFS
  0x65735546, // FUSE: GlusterFS, SSHFS
  0x01021997, // 9p
  0x7461636f, // OCFS2
  0x01161970, // GFS2
  0x5346414f, // AFS
  0x0bd00bd0, // Lustre
]);

/**
 * Opens a directory by its absolute path, one component at a time, each through the descriptor of the one before.
 *
 * @throws FileProblem if it is not a directory, or others can change a link on the way; the system's error
 */
export async function openRoot(path: string): Promise<FileHandle> {
  let rest = partsOf(path);
  let links = 0;
  let at = await open("/", WAY_FLAGS);
  try {
    for (let name = rest.shift(); name !== undefined; name = rest.shift()) {
      const place = `/proc/self/fd/${at.fd}/${name}`;
      const next = await openFolder(place);
      if (typeof next !== "string") {
        await at.close();
        at = next;
        continue;
      }
      if (++links > MAX_LINKS) throw new FileProblem("it leads through too many links");
      await assertTrusted(at, name);
      rest = [...partsOf(next), ...rest];
      if (!next.startsWith("/")) continue;
      await at.close();
      at = await open("/", WAY_FLAGS);
    }
    return await open(`/proc/self/fd/${at.fd}`, FOLDER_FLAGS);
  } finally {
    await at.close();
  }
}

/** Checks that only root, or we, can have put the link there. @throws FileProblem */
async function assertTrusted(folder: FileHandle, name: string): Promise<void> {
  const link = `"${name}" in it is a symbolic link`;
  if (NETWORK_TYPES.has((await statfs(`/proc/self/fd/${folder.fd}`)).type)) {
    throw new FileProblem(`${link} on a network share, which others can change`);
  }
  const { uid, gid, mode } = await folder.stat();
  const isOurs = uid === 0 || uid === process.geteuid?.();
  const mayOthersWrite = (mode & constants.S_IWOTH) !== 0 || ((mode & constants.S_IWGRP) !== 0 && gid !== 0);
  if (!isOurs || mayOthersWrite) throw new FileProblem(`${link} in a folder that others can change`);
}

const partsOf = (path: string): string[] => path.split("/").filter((part) => part !== "" && part !== ".");

/** A directory, or the target of the link that has its name. */
async function openFolder(place: string): Promise<FileHandle | string> {
  try {
    return await open(place, WAY_FLAGS | constants.O_NOFOLLOW);
  } catch (error) {
    const errno = errnoOf(error);
    if (errno !== "ENOTDIR" && errno !== "ELOOP") throw error;
    return await readlink(place).catch(() => {
      throw new FileProblem("it is not a directory");
    });
  }
}
