// SPDX-License-Identifier: AGPL-3.0-or-later
// The names of a backup that a user may have seen: from `list`, from `pvesm list`, from a file manager.
import { realpath } from "node:fs/promises";
import path from "node:path";
import { quote, RequestError } from "../core/index.ts";
import { parseArchiveName, STOREID_PATTERN } from "../pve/index.ts";

/**
 * The archive name, "100/qemu-1763802000", behind any of its forms: with "backup/" in front, as a volume id
 * ("STORE:backup/…"; the storage that it names is not compared), or as the path of the backup's directory.
 *
 * @throws RequestError for anything else
 */
export async function resolveBackupName(text: string, storePath: string): Promise<string> {
  const name = /^(?:[./]|\.\.\/)/.test(text) ? await belowStore(text, storePath) : withoutStoreid(text);
  try {
    return parseArchiveName(name.replace(/\/+$/, "")).archive;
  } catch {
    throw new RequestError(`Cannot use backup name ${quote(text)}: expected the form 100/qemu-1763802000`, {
      hint: "backup/100/qemu-1763802000, STORE:backup/100/qemu-1763802000 and the path of its directory are accepted, too",
    });
  }
}

function withoutStoreid(text: string): string {
  const colon = text.indexOf(":");
  return colon > 0 && STOREID_PATTERN.test(text.slice(0, colon)) ? text.slice(colon + 1) : text;
}

async function belowStore(text: string, storePath: string): Promise<string> {
  const [folder, root] = await Promise.all([resolveLinks(path.resolve(text)), resolveLinks(path.resolve(storePath))]);
  const below = path.relative(root, folder);
  if (below.startsWith("..")) throw new RequestError(`Cannot use path ${quote(text)}: it is not below "${storePath}"`);
  return below;
}

/** Nothing is known about a path that leads nowhere: it stays as it is, and the store does not find the backup. */
async function resolveLinks(from: string): Promise<string> {
  return await realpath(from).catch(() => from);
}
