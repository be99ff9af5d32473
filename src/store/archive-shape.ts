// SPDX-License-Identifier: AGPL-3.0-or-later
// Checks with two reads whether a container's archive that has no record looks complete. The upstream example writes
// plain tar and squashfs; a compressed tar was written by this software.
import type { RegularFile } from "../host/index.ts";

const TAR_BLOCK_BYTES = 512;
/** A tar ends with two blocks of zeroes, after a header block and a member. */
const TAR_END_BYTES = 2 * TAR_BLOCK_BYTES;
/** Source: POSIX pax, "ustar Interchange Format": the magic of a header, also in GNU's format. */
const TAR_MAGIC = "ustar";
const TAR_MAGIC_AT = 257;
/** The first fields of the squashfs superblock. Source: Linux, fs/squashfs/squashfs_fs.h. */
const SQUASHFS_MAGIC = 0x73717368;
const SQUASHFS_SUPERBLOCK_BYTES = 96;
const SQUASHFS_BYTES_USED_AT = 40;

/** @returns what is wrong with it, as the end of a sentence that begins with its name; undefined if nothing is */
export async function archiveProblem(file: RegularFile): Promise<string | undefined> {
  if (file.path.endsWith(".sqfs")) return await squashfsProblem(file);
  if (file.path.endsWith(".tar")) return await tarProblem(file);
  return "was written by this software: it is not whole";
}

async function tarProblem({ handle, fileBytes }: RegularFile): Promise<string | undefined> {
  if (fileBytes < TAR_BLOCK_BYTES + TAR_END_BYTES || fileBytes % TAR_BLOCK_BYTES !== 0) return "is cut off";
  const head = Buffer.alloc(TAR_BLOCK_BYTES);
  const end = Buffer.alloc(TAR_END_BYTES, 1);
  await handle.read(head, 0, head.length, 0);
  await handle.read(end, 0, end.length, fileBytes - end.length);
  if (head.toString("latin1", TAR_MAGIC_AT, TAR_MAGIC_AT + TAR_MAGIC.length) !== TAR_MAGIC)
    return "is not a tar archive";
  return end.every((byte) => byte === 0) ? undefined : "is cut off";
}

async function squashfsProblem({ handle, fileBytes }: RegularFile): Promise<string | undefined> {
  const head = Buffer.alloc(SQUASHFS_SUPERBLOCK_BYTES);
  const { bytesRead } = await handle.read(head, 0, head.length, 0);
  if (bytesRead < head.length || head.readUInt32LE(0) !== SQUASHFS_MAGIC) return "is not a squashfs image";
  return BigInt(fileBytes) < head.readBigUInt64LE(SQUASHFS_BYTES_USED_AT) ? "is cut off" : undefined;
}
