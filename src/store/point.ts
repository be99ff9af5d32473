// SPDX-License-Identifier: AGPL-3.0-or-later
// One backup that can be restored.
import { join } from "node:path";
import { tryCreateDigester } from "../block/index.ts";
import { errnoOf } from "../core/index.ts";
import { type CatalogEntry, classifyFolder } from "./catalog.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { PointDamagedError, PointNotFoundError } from "./errors.ts";
import { MAX_GUEST_CONFIG_BYTES } from "./guest-identity.ts";
import { damagedFile, readImageFile, unreadableFile } from "./image-file.ts";
import { readSmallFile } from "./json.ts";
import {
  type ArchiveName,
  deviceFileName,
  FIREWALL_CONFIG_FILE,
  GUEST_CONFIG_FILE,
  parseArchiveName,
  pickContainerArchive,
  volnameOf,
} from "./layout.ts";
import type { DeviceMode, Manifest, ManifestBase } from "./manifest.ts";

export interface PointDevice {
  readonly name: string;
  /** The image of this point alone: the top of its chain. */
  readonly path: string;
  readonly virtualBytes: number;
  readonly mode: DeviceMode;
  /** Recorded base of an incremental device; legacy points record none. */
  readonly base: ManifestBase | undefined;
}

/** A complete or legacy point. What a manifest records is undefined for legacy ones. */
export interface Point extends ArchiveName {
  readonly kind: "complete" | "legacy";
  readonly volname: string;
  readonly folder: string;
  readonly occupiedBytes: number;
  readonly uuid: string | undefined;
  readonly sequence: number | undefined;
  readonly storeid: string | undefined;
  readonly manifest: Manifest | undefined;
  readonly devices: ReadonlyMap<string, PointDevice>;
  /** Path of a container's archive. */
  readonly containerArchive: string | undefined;
  /** Byte-exact. @throws PointDamagedError if it is not what was committed */
  guestConfig(): Promise<Buffer>;
  /** Byte-exact; undefined if the guest had none. */
  firewallConfig(): Promise<Buffer | undefined>;
}

/**
 * Opens a point by its archive or volume name.
 *
 * @throws RequestError for an impossible name; PointNotFoundError; PointDamagedError; StoreUnavailableError
 */
export async function openPoint(context: StoreContext, archive: string): Promise<Point> {
  const name = parseArchiveName(archive);
  const entry = await classifyFolder(context, name);
  if (entry === undefined) throw new PointNotFoundError(`Cannot open "${volnameOf(name.archive)}": no such backup`);
  if (entry.kind === "damaged") {
    throw new PointDamagedError(`Cannot use "${volnameOf(name.archive)}": ${entry.reason}`);
  }
  return entry.kind === "complete"
    ? completePoint(context, entry.name, entry.manifest, entry.occupiedBytes)
    : await legacyPoint(context, entry);
}

export function completePoint(
  context: StoreContext,
  name: ArchiveName,
  manifest: Manifest,
  occupiedBytes: number,
): Point {
  const folder = pointFolder(context, name.vmid, name.folderName);
  const devices = new Map<string, PointDevice>();
  for (const { name: device, file, virtualBytes, mode, base } of manifest.devices) {
    devices.set(device, { name: device, path: join(folder, file), virtualBytes, mode, base });
  }
  const archive = name.type === "lxc" ? pickContainerArchive(manifest.files.map((file) => file.name)) : undefined;
  return {
    ...name,
    kind: "complete",
    volname: volnameOf(name.archive),
    folder,
    occupiedBytes,
    uuid: manifest.uuid,
    sequence: manifest.sequence,
    storeid: manifest.storeid,
    manifest,
    devices,
    containerArchive: archive === undefined ? undefined : join(folder, archive),
    guestConfig: async () => await readRecorded(folder, manifest, GUEST_CONFIG_FILE),
    firewallConfig: async () =>
      manifest.files.some((file) => file.name === FIREWALL_CONFIG_FILE)
        ? await readRecorded(folder, manifest, FIREWALL_CONFIG_FILE)
        : undefined,
  };
}

async function legacyPoint(context: StoreContext, entry: Extract<CatalogEntry, { kind: "legacy" }>): Promise<Point> {
  const { name } = entry;
  const folder = pointFolder(context, name.vmid, name.folderName);
  const devices = new Map<string, PointDevice>();
  for (const device of entry.devices) {
    const path = join(folder, deviceFileName(device));
    const { header } = await readImageFile(path);
    const mode: DeviceMode = header.backing === undefined ? "full" : "incremental";
    devices.set(device, { name: device, path, virtualBytes: header.virtualBytes, mode, base: undefined });
  }
  return {
    ...name,
    kind: "legacy",
    volname: volnameOf(name.archive),
    folder,
    occupiedBytes: entry.occupiedBytes,
    uuid: undefined,
    sequence: undefined,
    storeid: undefined,
    manifest: undefined,
    devices,
    containerArchive: entry.containerArchive === undefined ? undefined : join(folder, entry.containerArchive),
    guestConfig: async () => await readConfig(join(folder, GUEST_CONFIG_FILE)),
    firewallConfig: async () =>
      await readConfig(join(folder, FIREWALL_CONFIG_FILE)).catch((error: unknown) => {
        if (errnoOf(error) === "ENOENT") return undefined;
        throw error;
      }),
  };
}

/** Reads a config and compares it with what the manifest records. */
async function readRecorded(folder: string, manifest: Manifest, file: string): Promise<Buffer> {
  const path = join(folder, file);
  const bytes = await readConfig(path);
  const recorded = manifest.files.find((one) => one.name === file);
  if (recorded === undefined) throw damagedFile(path, "the manifest does not know it");
  if (bytes.length !== recorded.sizeBytes) {
    throw damagedFile(path, `it has ${bytes.length} bytes, ${recorded.sizeBytes} are recorded`);
  }
  const digester = recorded.digest === undefined ? undefined : tryCreateDigester(recorded.digest.algorithm);
  digester?.update(bytes);
  if (digester !== undefined && digester.finish().value !== recorded.digest?.value) {
    throw damagedFile(path, "its digest is not the recorded one");
  }
  return bytes;
}

async function readConfig(path: string): Promise<Buffer> {
  try {
    return await readSmallFile(path, MAX_GUEST_CONFIG_BYTES);
  } catch (error) {
    throw unreadableFile(path, error);
  }
}
