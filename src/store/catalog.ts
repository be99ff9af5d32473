// SPDX-License-Identifier: AGPL-3.0-or-later
// What is in the store. Every directory named like a point is complete, legacy or damaged; nothing that others put
// there makes a listing fail.
import { environmentError, errnoOf, messageOf, orderedMap } from "../core/index.ts";
import { FileProblem, type Folder, type FolderEntry } from "../host/index.ts";
import { type ArchiveName, checkVmid, isVmidName, MAX_GUEST_CONFIG_BYTES, parseFolderName } from "../pve/index.ts";
import { archiveProblem } from "./archive-shape.ts";
import { checkAvailable, type StoreContext } from "./context.ts";
import { PointDamagedError, StoreUnavailableError } from "./errors.ts";
import { MAX_JSON_BYTES, NewerFormatProblem } from "./format/json.ts";
import {
  ATTRIBUTES_FILE,
  deviceFileName,
  GUEST_CONFIG_FILE,
  isDigestsFileName,
  MANIFEST_FILE,
} from "./format/layout.ts";
import { isOwnImage, judgeLegacy } from "./format/legacy.ts";
import { type Manifest, parseManifest } from "./format/manifest.ts";
import { openImageFile } from "./image-file.ts";

export type CatalogEntry =
  | {
      readonly kind: "complete";
      readonly name: ArchiveName;
      readonly manifest: Manifest;
      /** The file it was read from. */
      readonly manifestFile: FolderEntry;
      readonly occupiedBytes: number;
      /** Whether there is an attributes.json to be read. */
      readonly hasAttributes: boolean;
    }
  | {
      readonly kind: "legacy";
      readonly name: ArchiveName;
      readonly devices: readonly string[];
      readonly containerArchive: string | undefined;
      readonly occupiedBytes: number;
      readonly hasAttributes: boolean;
    }
  | {
      readonly kind: "damaged";
      readonly name: ArchiveName;
      readonly reason: string;
      /** Why it could not be read at all; undefined for what was read and found wrong. */
      readonly unreadable?: "failed" | "newer format";
    };

export type CompleteEntry = Extract<CatalogEntry, { kind: "complete" }>;

const FILES_IN_FLIGHT = 16;
const MAX_FILES_PER_POINT = 5000;

/** Ids of the guests that have a directory, ascending. */
export async function listGuests(context: StoreContext): Promise<number[]> {
  await checkAvailable(context);
  try {
    const names = (await context.folder.list()).filter(isVmidName);
    return names.map(Number).sort((a, b) => a - b);
  } catch (error) {
    throw new StoreUnavailableError(environmentError("list", context.path, error).message, { cause: error });
  }
}

/**
 * The directory of a guest; undefined if it has none.
 *
 * @throws PointDamagedError if something else has its name; StoreUnavailableError; EnvironmentError
 */
export async function openGuest(context: StoreContext, vmid: number): Promise<Folder | undefined> {
  const name = String(checkVmid(vmid));
  const path = context.folder.pathOf(name);
  try {
    return await context.folder.openFolder(name);
  } catch (error) {
    if (error instanceof FileProblem) throw new PointDamagedError(`Cannot open "${path}": ${error.message}`);
    if (errnoOf(error) !== "ENOENT") throw environmentError("open", path, error);
    await checkAvailable(context);
    return undefined;
  }
}

/** Names of the directories that are named like points, in order. @throws EnvironmentError */
export async function listPointFolders(guest: Folder, vmid: number): Promise<ArchiveName[]> {
  try {
    const names = (await guest.list()).sort();
    return names.map((name) => parseFolderName(vmid, name)).filter((name) => name !== undefined);
  } catch (error) {
    throw environmentError("list", guest.path, error);
  }
}

/** @returns undefined if there is no such directory (any more) */
export async function classifyFolder(guest: Folder, name: ArchiveName): Promise<CatalogEntry | undefined> {
  try {
    await using folder = await guest.openFolder(name.folderName);
    return await classifyFiles(name, folder, await lookAtFiles(folder, "may vanish"));
  } catch (error) {
    if (error instanceof NewerFormatProblem) {
      return { kind: "damaged", name, reason: messageOf(error), unreadable: "newer format" };
    }
    if (error instanceof FileProblem) return { kind: "damaged", name, reason: messageOf(error) };
    const isThere = await guest.look(name.folderName).then(
      (found) => found !== undefined,
      () => true,
    );
    // A directory that exists but cannot be read must not hide the others.
    const path = guest.pathOf(name.folderName);
    if (!isThere) return undefined;
    return { kind: "damaged", name, reason: environmentError("read", path, error).message, unreadable: "failed" };
  }
}

async function classifyFiles(name: ArchiveName, folder: Folder, files: FileTable): Promise<CatalogEntry> {
  const occupiedBytes = occupiedBytesOf(files.values());
  const hasAttributes = files.has(ATTRIBUTES_FILE);
  const manifestFile = files.get(MANIFEST_FILE);
  if (manifestFile !== undefined) {
    const bytes = await folder.readFile(MANIFEST_FILE, MAX_JSON_BYTES);
    const manifest = naming(MANIFEST_FILE, () => parseManifest(bytes));
    checkManifestAgainst(name, manifest, files);
    return { kind: "complete", name, manifest, manifestFile, occupiedBytes, hasAttributes };
  }
  if (!files.has(GUEST_CONFIG_FILE)) throw new FileProblem("it has no manifest");
  for (const [file, { kind, links }] of files) {
    if (kind === "file" && links > 1)
      throw new FileProblem(`it has no manifest, and its file ${file} has several names`);
  }
  const config = await folder.readFile(GUEST_CONFIG_FILE, MAX_GUEST_CONFIG_BYTES);
  const regular = new Set([...files].filter(([, found]) => found.kind === "file").map(([file]) => file));
  const verdict = judgeLegacy(name.type, config, regular);
  if ("problem" in verdict) throw new FileProblem(verdict.problem);
  for (const device of verdict.devices) await refuseOwnImage(folder, device);
  if (verdict.containerArchive !== undefined) await refuseCutArchive(folder, verdict.containerArchive);
  return { kind: "legacy", name, ...verdict, occupiedBytes, hasAttributes };
}

/** Says which file a problem is about: "it is not valid JSON" becomes "manifest.json is not valid JSON". */
function naming<T>(file: string, parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    if (!(error instanceof FileProblem)) throw error;
    const text = error.message.startsWith("it ") ? `${file} ${error.message.slice(3)}` : `${file}: ${error.message}`;
    throw error instanceof NewerFormatProblem ? new NewerFormatProblem(text) : new FileProblem(text);
  }
}

/** One of our points that lost its manifest, perhaps in an incomplete copy: what else is missing is unknown. */
async function refuseOwnImage(folder: Folder, device: string): Promise<void> {
  await using image = await openImageFile(folder, deviceFileName(device));
  if (isOwnImage(image.header)) {
    throw new FileProblem(`it has no manifest, but its disk ${device} was written by this software: it is not whole`);
  }
}

async function refuseCutArchive(folder: Folder, archive: string): Promise<void> {
  await using file = await folder.openFile(archive);
  const problem = await archiveProblem(file);
  if (problem !== undefined) throw new FileProblem(`it has no manifest, and its ${archive} ${problem}`);
}

function checkManifestAgainst(name: ArchiveName, manifest: Manifest, files: FileTable): void {
  if (manifest.vmid !== name.vmid || manifest.type !== name.type || manifest.epoch !== name.epoch) {
    throw new FileProblem(`its manifest is of another point (${manifest.vmid}/${manifest.type}-${manifest.epoch})`);
  }
  for (const file of manifest.files) {
    if (isDigestsFileName(file.name)) continue; // a disk can be restored without them
    const found = files.get(file.name);
    if (found === undefined) throw new FileProblem(`its file ${file.name} is missing`);
    if (found.kind !== "file") throw new FileProblem(`its file ${file.name} is not a regular file`);
    if (found.sizeBytes !== file.sizeBytes) {
      throw new FileProblem(`its file ${file.name} has ${found.sizeBytes} bytes, expected ${file.sizeBytes}`);
    }
  }
}

/** What the names in a directory are. */
export type FileTable = ReadonlyMap<string, FolderEntry>;

/**
 * Looks at every name in a directory.
 *
 * @param listed whether a file that the directory lists may be gone when it is looked at
 * @throws FileProblem if there are too many; the system's error
 */
export async function lookAtFiles(folder: Folder, listed: "may vanish" | "must stay"): Promise<FileTable> {
  const names = await folder.list();
  if (names.length > MAX_FILES_PER_POINT) throw new FileProblem(`it holds ${names.length} files, too many`);
  const files = new Map<string, FolderEntry>();
  for await (const [name, found] of orderedMap(names, FILES_IN_FLIGHT, async (one) => {
    return [one, await folder.look(one)] as const;
  })) {
    if (found !== undefined) files.set(name, found);
    else if (listed === "must stay") throw new FileProblem(`its file ${name} has vanished`);
  }
  return files;
}

/** Disk space that a point occupies; never 0, which PVE takes for "unknown". */
export function occupiedBytesOf(files: Iterable<FolderEntry>): number {
  let bytes = 0;
  for (const found of files) bytes += found.kind === "file" ? found.occupiedBytes : 0;
  return Math.max(1, bytes);
}
