// SPDX-License-Identifier: AGPL-3.0-or-later
// The folder that a storage's path leads to. The path is the administrator's, and links in it are followed, as long
// as they are the administrator's too: one that lies on a network share may be anybody's.
import { constants } from "node:fs";
import { type FileHandle, open, readlink, statfs } from "node:fs/promises";
import { errnoOf } from "../core/index.ts";
import { FileProblem } from "./regular-file.ts";

const FOLDER_FLAGS = constants.O_RDONLY | constants.O_DIRECTORY;
/** As many as the kernel follows. Source: path_resolution(7). */
const MAX_LINKS = 40;

/** f_type of file systems that other hosts write to. Source: statfs(2), and linux/magic.h. */
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
 * Opens a folder by its absolute path, one component after the other, each through the descriptor of the one before.
 *
 * @throws FileProblem if it is not a directory, or a link on the way lies on a share; the system's error
 */
export async function openRoot(path: string): Promise<FileHandle> {
  let rest = partsOf(path);
  let links = 0;
  let at = await open("/", FOLDER_FLAGS);
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
      if (NETWORK_TYPES.has((await statfs(`/proc/self/fd/${at.fd}`)).type)) {
        throw new FileProblem(`"${name}" in it is a symbolic link on a network share, which others can change`);
      }
      rest = [...partsOf(next), ...rest];
      if (!next.startsWith("/")) continue;
      await at.close();
      at = await open("/", FOLDER_FLAGS);
    }
    return at;
  } catch (error) {
    await at.close();
    throw error;
  }
}

const partsOf = (path: string): string[] => path.split("/").filter((part) => part !== "" && part !== ".");

/** A folder, or where the link leads that has its name. */
async function openFolder(place: string): Promise<FileHandle | string> {
  try {
    return await open(place, FOLDER_FLAGS | constants.O_NOFOLLOW);
  } catch (error) {
    const errno = errnoOf(error);
    if (errno !== "ENOTDIR" && errno !== "ELOOP") throw error;
    return await readlink(place).catch(() => {
      throw new FileProblem("it is not a directory");
    });
  }
}
