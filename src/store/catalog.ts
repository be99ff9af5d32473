// SPDX-License-Identifier: AGPL-3.0-or-later
// What lies in the store. Every folder named like a point is complete, legacy or damaged; nothing that
// somebody put there makes a listing fail.
import type { Stats } from "node:fs";
import { lstat, readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { environmentError, errnoOf, messageOf, orderedMap } from "../core/index.ts";
import type { StoreContext, StoreIdentity } from "./context.ts";
import { PointDamagedError, StoreUnavailableError } from "./errors.ts";
import { MAX_GUEST_CONFIG_BYTES } from "./guest-identity.ts";
import { readImageFile } from "./image-file.ts";
import { JsonProblem, readSmallFile } from "./json.ts";
import {
  type ArchiveName,
  deviceFileName,
  GUEST_CONFIG_FILE,
  guestFolder,
  isVmidName,
  MANIFEST_FILE,
  parseFolderName,
} from "./layout.ts";
import { isOwnImage, judgeLegacy } from "./legacy.ts";
import { type Manifest, parseManifest } from "./manifest.ts";

export type CatalogEntry =
  | {
      readonly kind: "complete";
      readonly name: ArchiveName;
      readonly manifest: Manifest;
      readonly occupiedBytes: number;
    }
  | {
      readonly kind: "legacy";
      readonly name: ArchiveName;
      readonly devices: readonly string[];
      readonly containerArchive: string | undefined;
      readonly occupiedBytes: number;
    }
  | { readonly kind: "damaged"; readonly name: ArchiveName; readonly reason: string };

export type CompleteEntry = Extract<CatalogEntry, { kind: "complete" }>;

const FOLDERS_IN_FLIGHT = 16;
const MAX_FILES_PER_POINT = 5000;
const BLOCK_BYTES = 512; // the unit of st_blocks, whatever the file system's own

const MOUNT_HINT = "check that the share is mounted";

/** @throws StoreUnavailableError with one clear sentence */
export async function checkAvailable(path: string): Promise<StoreIdentity> {
  const found = await stat(path, { bigint: true }).catch((error: unknown) => {
    const { message } = environmentError("use storage path", path, error);
    throw new StoreUnavailableError(message, { cause: error, hint: MOUNT_HINT });
  });
  if (!found.isDirectory()) throw new StoreUnavailableError(`Cannot use storage path "${path}": it is not a folder`);
  return { dev: found.dev, ino: found.ino };
}

/**
 * For whoever is about to write: the path still leads to the folder that was opened.
 *
 * @throws StoreUnavailableError
 */
export async function checkSameStore({ path, identity }: StoreContext): Promise<void> {
  const { dev, ino } = await checkAvailable(path);
  if (dev === identity.dev && ino === identity.ino) return;
  throw new StoreUnavailableError(
    `Cannot use storage path "${path}": another file system is mounted there, or the share is gone`,
    { hint: MOUNT_HINT },
  );
}

/** Ids of the guests that have a folder, ascending. */
export async function listGuests(context: StoreContext): Promise<number[]> {
  await checkAvailable(context.path);
  try {
    const names = (await readdir(context.path)).filter(isVmidName);
    return names.map(Number).sort((a, b) => a - b);
  } catch (error) {
    throw new StoreUnavailableError(environmentError("list", context.path, error).message, { cause: error });
  }
}

/** Every point-like folder of one guest, in order of names. A guest without a folder has none. */
export async function scanGuest(context: StoreContext, vmid: number, signal: AbortSignal): Promise<CatalogEntry[]> {
  const entries: CatalogEntry[] = [];
  const names = await listPointFolders(context, vmid);
  for await (const entry of orderedMap(names, FOLDERS_IN_FLIGHT, (name) => classifyFolder(context, name))) {
    signal.throwIfAborted();
    if (entry !== undefined) entries.push(entry);
  }
  return entries;
}

async function listPointFolders(context: StoreContext, vmid: number): Promise<ArchiveName[]> {
  const folder = guestFolder(context.path, vmid);
  try {
    if (!(await lstat(folder)).isDirectory())
      throw new PointDamagedError(`Cannot list "${folder}": it is not a folder`);
    const names = (await readdir(folder)).sort();
    return names.map((name) => parseFolderName(vmid, name)).filter((name) => name !== undefined);
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw environmentError("list", folder, error);
    await checkAvailable(context.path);
    return [];
  }
}

/** @returns undefined if there is no such folder (any more) */
export async function classifyFolder(context: StoreContext, name: ArchiveName): Promise<CatalogEntry | undefined> {
  const parent = guestFolder(context.path, name.vmid);
  const folder = join(parent, name.folderName);
  try {
    const isFolder = (await lstat(parent)).isDirectory() && (await lstat(folder)).isDirectory();
    if (!isFolder) throw new JsonProblem("it is not a folder");
    return await classifyFiles(name, folder, await statFiles(folder, "may vanish"));
  } catch (error) {
    if (error instanceof JsonProblem) return { kind: "damaged", name, reason: messageOf(error) };
    const isThere = await lstat(folder).then(
      () => true,
      (missing: unknown) => errnoOf(missing) !== "ENOENT",
    );
    // A folder that is there and cannot be read must not hide the others.
    if (isThere) return { kind: "damaged", name, reason: environmentError("read", folder, error).message };
    await checkAvailable(context.path);
    return undefined;
  }
}

async function classifyFiles(name: ArchiveName, folder: string, files: Map<string, Stats>): Promise<CatalogEntry> {
  const occupiedBytes = occupiedBytesOf(files.values());
  if (files.has(MANIFEST_FILE)) {
    const manifest = parseManifest(await readSmallFile(join(folder, MANIFEST_FILE)));
    checkManifestAgainst(name, manifest, files);
    return { kind: "complete", name, manifest, occupiedBytes };
  }
  if (!files.has(GUEST_CONFIG_FILE)) throw new JsonProblem("it has no manifest");
  const config = await readSmallFile(join(folder, GUEST_CONFIG_FILE), MAX_GUEST_CONFIG_BYTES);
  const regular = new Set([...files].filter(([, found]) => found.isFile()).map(([file]) => file));
  const verdict = judgeLegacy(name.type, config, regular);
  if ("problem" in verdict) throw new JsonProblem(verdict.problem);
  for (const device of verdict.devices) await refuseOwnImage(folder, device);
  return { kind: "legacy", name, ...verdict, occupiedBytes };
}

/** A point of ours that lost its manifest, in a copy cut short perhaps: nobody knows what else is missing. */
async function refuseOwnImage(folder: string, device: string): Promise<void> {
  const { header } = await readImageFile(join(folder, deviceFileName(device)));
  if (isOwnImage(header)) {
    throw new JsonProblem(`it has no manifest, but its disk ${device} was written by this software: it is not whole`);
  }
}

function checkManifestAgainst(name: ArchiveName, manifest: Manifest, files: Map<string, Stats>): void {
  if (manifest.vmid !== name.vmid || manifest.type !== name.type || manifest.epoch !== name.epoch) {
    throw new JsonProblem(`its manifest is of another point (${manifest.vmid}/${manifest.type}-${manifest.epoch})`);
  }
  for (const file of manifest.files) {
    const found = files.get(file.name);
    if (found === undefined) throw new JsonProblem(`its file ${file.name} is missing`);
    if (!found.isFile()) throw new JsonProblem(`its file ${file.name} is not a regular file`);
    if (found.size !== file.sizeBytes) {
      throw new JsonProblem(`its file ${file.name} has ${found.size} bytes, ${file.sizeBytes} are recorded`);
    }
  }
}

/**
 * What the files of a folder are, without following links.
 *
 * @param listed whether a file that the folder names may be gone when it is looked at
 * @throws JsonProblem if there are too many; the system's error
 */
export async function statFiles(folder: string, listed: "may vanish" | "must stay"): Promise<Map<string, Stats>> {
  const names = await readdir(folder);
  if (names.length > MAX_FILES_PER_POINT) throw new JsonProblem(`it holds ${names.length} files, too many`);
  const files = new Map<string, Stats>();
  for await (const [name, found] of orderedMap(names, FOLDERS_IN_FLIGHT, async (one) => {
    const found = await lstat(join(folder, one)).catch((error: unknown) => {
      if (listed === "may vanish" && errnoOf(error) === "ENOENT") return undefined;
      throw error;
    });
    return [one, found] as const;
  })) {
    if (found !== undefined) files.set(name, found);
  }
  return files;
}

/** What a point takes on the disk; never 0, PVE takes 0 for "unknown". */
export function occupiedBytesOf(files: Iterable<Stats>): number {
  let bytes = 0;
  for (const found of files) bytes += found.isFile() ? found.blocks * BLOCK_BYTES : 0;
  return Math.max(1, bytes);
}
