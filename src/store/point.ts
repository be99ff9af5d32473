// SPDX-License-Identifier: AGPL-3.0-or-later
// One backup that can be restored.

import { EnvironmentError, errnoOf, type HostError, NewerFormatError, NotFoundError } from "../core/index.ts";
import { tryCreateDigester } from "../digest/index.ts";
import { type Folder, type RegularFile, readWhole } from "../host/index.ts";
import { type ArchiveName, MAX_GUEST_CONFIG_BYTES, parseArchiveName, volnameOf } from "../pve/index.ts";
import { type CatalogEntry, classifyFolder, openGuest } from "./catalog.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { PointDamagedError } from "./errors.ts";
import { deviceFileName, FIREWALL_CONFIG_FILE, GUEST_CONFIG_FILE, pickContainerArchive } from "./format/layout.ts";
import type { DeviceMode, Manifest, ManifestBase } from "./format/manifest.ts";
import { damagedFile, openImageFile, refuseShared, unreadableFile } from "./image-file.ts";

export interface PointDevice {
  readonly name: string;
  /** Name of the image of this point alone: the top of its chain. */
  readonly file: string;
  readonly virtualBytes: number;
  readonly mode: DeviceMode;
  /** Recorded base of an incremental device; legacy points record none. */
  readonly base: ManifestBase | undefined;
}

/** A complete or legacy point. What a manifest records is undefined for legacy ones. */
export interface Point extends ArchiveName {
  readonly kind: "complete" | "legacy";
  readonly volname: string;
  /** For messages, and for PVE, which shows it. */
  readonly path: string;
  readonly occupiedBytes: number;
  readonly uuid: string | undefined;
  readonly sequence: number | undefined;
  readonly storeid: string | undefined;
  readonly manifest: Manifest | undefined;
  readonly devices: ReadonlyMap<string, PointDevice>;
  /** Name of a container's archive. */
  readonly containerArchive: string | undefined;
  /** Opens a file of the point. @throws PointDamagedError if it is missing or not a regular file; EnvironmentError */
  openFile(name: string): Promise<RegularFile>;
  /** Byte-exact. @throws PointDamagedError if it is not what was committed */
  guestConfig(): Promise<Buffer>;
  /** Byte-exact; undefined if the guest had none. */
  firewallConfig(): Promise<Buffer | undefined>;
}

/**
 * Opens a point by its archive or volume name.
 *
 * @throws RequestError for an impossible name; NotFoundError; PointDamagedError; StoreUnavailableError
 */
export async function openPoint(context: StoreContext, archive: string): Promise<Point> {
  const name = parseArchiveName(archive);
  await using guest = await openGuest(context, name.vmid);
  const entry = guest === undefined ? undefined : await classifyFolder(guest, name);
  if (entry === undefined) throw notFound(name);
  return await toPoint(context, entry);
}

/** @throws PointDamagedError, NewerFormatError or EnvironmentError for what cannot be used */
export async function toPoint(context: StoreContext, entry: CatalogEntry): Promise<Point> {
  if (entry.kind === "damaged") throw unusable(entry);
  return entry.kind === "complete"
    ? completePoint(context, entry.name, entry.manifest, entry.occupiedBytes)
    : await legacyPoint(context, entry);
}

/** What could not be read may be intact: the disk fails, a permission is missing, or a newer version wrote it. */
function unusable({ name, reason, unreadable }: Extract<CatalogEntry, { kind: "damaged" }>): HostError {
  const message = `Cannot use "${volnameOf(name.archive)}": ${reason}`;
  if (unreadable === "newer format") return new NewerFormatError(message);
  return unreadable === "failed" ? new EnvironmentError(message) : new PointDamagedError(message);
}

/** @throws PointDamagedError, NotFoundError, EnvironmentError */
export async function openPointFolder(context: StoreContext, name: ArchiveName): Promise<Folder> {
  const { vmid, folderName } = name;
  await using guest = await openGuest(context, vmid);
  try {
    if (guest !== undefined) return await guest.openFolder(folderName);
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw unreadableFile(pointFolder(context, vmid, folderName), error);
  }
  throw notFound(name);
}

export function notFound({ archive }: ArchiveName): NotFoundError {
  return new NotFoundError(`Cannot open "${volnameOf(archive)}": there is no such backup`);
}

export function completePoint(
  context: StoreContext,
  name: ArchiveName,
  manifest: Manifest,
  occupiedBytes: number,
): Point {
  const devices = new Map<string, PointDevice>();
  for (const { name: device, file, virtualBytes, mode, base } of manifest.devices) {
    devices.set(device, { name: device, file, virtualBytes, mode, base });
  }
  return {
    ...name,
    kind: "complete",
    volname: volnameOf(name.archive),
    path: pointFolder(context, name.vmid, name.folderName),
    occupiedBytes,
    uuid: manifest.uuid,
    sequence: manifest.sequence,
    storeid: manifest.storeid,
    manifest,
    devices,
    containerArchive:
      name.type === "lxc" ? pickContainerArchive(manifest.files.map(({ name: file }) => file)) : undefined,
    openFile: async (file) => await openFileOf(context, name, file),
    guestConfig: async () => await readRecorded(context, name, manifest, GUEST_CONFIG_FILE),
    firewallConfig: async () =>
      manifest.files.some((file) => file.name === FIREWALL_CONFIG_FILE)
        ? await readRecorded(context, name, manifest, FIREWALL_CONFIG_FILE)
        : undefined,
  };
}

async function legacyPoint(context: StoreContext, entry: Extract<CatalogEntry, { kind: "legacy" }>): Promise<Point> {
  const { name } = entry;
  await using folder = await openPointFolder(context, name);
  const devices = new Map<string, PointDevice>();
  for (const device of entry.devices) {
    const file = deviceFileName(device);
    await using image = await openImageFile(folder, file);
    const { backing, virtualBytes } = image.header;
    const mode: DeviceMode = backing === undefined ? "full" : "incremental";
    devices.set(device, { name: device, file, virtualBytes, mode, base: undefined });
  }
  return {
    ...name,
    kind: "legacy",
    volname: volnameOf(name.archive),
    path: folder.path,
    occupiedBytes: entry.occupiedBytes,
    uuid: undefined,
    sequence: undefined,
    storeid: undefined,
    manifest: undefined,
    devices,
    containerArchive: entry.containerArchive,
    openFile: async (file) => await openFileOf(context, name, file),
    guestConfig: async () => await readConfig(context, name, GUEST_CONFIG_FILE, false),
    firewallConfig: async () =>
      await readConfig(context, name, FIREWALL_CONFIG_FILE, false).catch((error: unknown) => {
        if (errnoOf(error) === "ENOENT") return undefined;
        throw error;
      }),
  };
}

async function openFileOf(context: StoreContext, name: ArchiveName, file: string): Promise<RegularFile> {
  await using folder = await openPointFolder(context, name);
  try {
    return await folder.openFile(file);
  } catch (error) {
    const path = folder.pathOf(file);
    throw errnoOf(error) === "ENOENT" ? damagedFile(path, "it is missing") : unreadableFile(path, error);
  }
}

/** Reads a config and compares it with what the manifest records. */
async function readRecorded(
  context: StoreContext,
  name: ArchiveName,
  manifest: Manifest,
  file: string,
): Promise<Buffer> {
  const path = `${pointFolder(context, name.vmid, name.folderName)}/${file}`;
  const recorded = manifest.files.find((one) => one.name === file);
  const bytes = await readConfig(context, name, file, recorded?.digest !== undefined);
  if (recorded === undefined) throw damagedFile(path, "the manifest does not list it");
  if (bytes.length !== recorded.sizeBytes) {
    throw damagedFile(path, `it has ${bytes.length} bytes, expected ${recorded.sizeBytes}`);
  }
  const digester = recorded.digest === undefined ? undefined : tryCreateDigester(recorded.digest.algorithm);
  digester?.update(bytes);
  if (digester !== undefined && digester.finish().value !== recorded.digest?.value) {
    throw damagedFile(path, `checksum mismatch (${recorded.digest?.algorithm})`);
  }
  return bytes;
}

/** @param isRecorded the caller compares the bytes with a digest */
async function readConfig(
  context: StoreContext,
  name: ArchiveName,
  file: string,
  isRecorded: boolean,
): Promise<Buffer> {
  await using folder = await openPointFolder(context, name);
  try {
    await using opened = await folder.openFile(file);
    if (!isRecorded) refuseShared(opened);
    return await readWhole(opened, MAX_GUEST_CONFIG_BYTES);
  } catch (error) {
    throw unreadableFile(folder.pathOf(file), error);
  }
}
