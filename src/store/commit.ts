// SPDX-License-Identifier: AGPL-3.0-or-later
// The commit of a point: files synced, manifest last, witness in flight, rename, then the rest.
import type { Stats } from "node:fs";
import { chmod } from "node:fs/promises";
import { join } from "node:path";
import { type Digest, tryCreateDigester } from "../block/index.ts";
import { environmentError, errnoOf, HostError, messageOf, RequestError } from "../core/index.ts";
import type { ProcessIdentity } from "../host/index.ts";
import { foreignFolders } from "./base.ts";
import { occupiedBytesOf, scanGuest, statFiles } from "./catalog.ts";
import { checkImage, resolveChain } from "./chain.ts";
import type { StoreContext } from "./context.ts";
import { FILE_MODE } from "./durable.ts";
import { BaseUnusableError, PointDamagedError } from "./errors.ts";
import { type GuestIdentity, MAX_GUEST_CONFIG_BYTES, parseVmgenid } from "./guest-identity.ts";
import type { GuestLock } from "./guest-lock.ts";
import { readImageFile, unreadableFile } from "./image-file.ts";
import { JsonProblem, readSmallFile } from "./json.ts";
import { deviceFileName, GUEST_CONFIG_FILE, isPlainFileName, MANIFEST_FILE } from "./layout.ts";
import {
  cutLine,
  formatManifest,
  type Manifest,
  type ManifestContainer,
  type ManifestDevice,
  type ManifestFile,
  parseManifest,
} from "./manifest.ts";
import { completePoint, openPoint, type Point } from "./point.ts";
import { publish, type StagedFolder } from "./publish.ts";

/** What a job reports about one device; the store reads size and header from the file itself. */
export interface StagedDevice {
  readonly name: string;
  readonly virtualBytes: number;
  /** The base of an incremental device; a full one has none. */
  readonly base?: { readonly folderName: string; readonly uuid: string | undefined };
  /** Why it is full; empty for an incremental one. */
  readonly reason: string;
  readonly compression: string;
  readonly readBytes: number;
  readonly writtenBytes: number;
  readonly zeroBytes: number;
  /** Size and digest of the file as they were written: the file must agree. */
  readonly fileBytes: number;
  readonly digest: Digest;
}

export interface CommitParts {
  readonly devices: readonly StagedDevice[];
  /** The QEMU process the bitmaps live in, as it was at the start of the job. */
  readonly process?: ProcessIdentity | undefined;
  /** Digests of other large files, by name. Small files get theirs here. */
  readonly digests?: ReadonlyMap<string, Digest>;
  /** What the archive of a container holds. */
  readonly container?: ManifestContainer;
}

/** See StagedPoint.commit(). */
export async function commitPoint(
  context: StoreContext,
  lock: GuestLock,
  staged: StagedFolder,
  parts: CommitParts,
  signal: AbortSignal,
): Promise<Point> {
  await lock.assertHeld();
  const files = await syncFiles(context, staged, parts);
  const devices: ManifestDevice[] = [];
  for (const device of parts.devices) devices.push(await checkDevice(context, staged, device, signal));
  const guest = await readGuest(staged, parts);
  const manifest = await writeManifest(context, staged, {
    guest,
    devices,
    ...(parts.container === undefined ? {} : { container: parts.container }),
    files,
  });
  const occupiedBytes = occupiedBytesOf((await statStaged(staged)).values());
  const foreign = foreignFolders(await scanGuest(context, staged.name.vmid, signal));
  signal.throwIfAborted();
  await publish(context, lock, staged, { guest, foreign });
  return completePoint(context, staged.name, manifest, occupiedBytes);
}

/** Nobody else works here: what the folder names and cannot be looked at must not fall out of the manifest. */
async function statStaged({ folder }: StagedFolder): Promise<Map<string, Stats>> {
  return await statFiles(folder, "must stay").catch((error: unknown) => {
    throw unreadableFile(folder, error);
  });
}

/** Every file of the staging folder, on the disk, private, and as long as it was reported to be. */
async function syncFiles(context: StoreContext, staged: StagedFolder, parts: CommitParts): Promise<ManifestFile[]> {
  const files: ManifestFile[] = [];
  for (const [name, found] of [...(await statStaged(staged))].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const path = join(staged.folder, name);
    if (!found.isFile() || !isPlainFileName(name) || name === MANIFEST_FILE) {
      throw new RequestError(`Cannot commit "${path}": it does not belong into a backup`);
    }
    await chmod(path, FILE_MODE).catch(() => undefined); // CIFS has no modes of its own
    await context.io.syncFile(path);
    const device = parts.devices.find((one) => deviceFileName(one.name) === name);
    if (device !== undefined && device.fileBytes !== found.size) {
      throw new PointDamagedError(
        `Cannot commit "${path}": it has ${found.size} bytes, ${device.fileBytes} were written`,
      );
    }
    const digest = device?.digest ?? parts.digests?.get(name) ?? (await digestSmallFile(path, found.size));
    files.push({ name, sizeBytes: found.size, ...(digest === undefined ? {} : { digest }) });
  }
  return files;
}

async function digestSmallFile(path: string, sizeBytes: number): Promise<Digest | undefined> {
  if (sizeBytes > MAX_GUEST_CONFIG_BYTES) return undefined;
  const digester = tryCreateDigester("sha256"); // which every system can compare
  const bytes = await readSmallFile(path, MAX_GUEST_CONFIG_BYTES).catch((error: unknown) => {
    throw unreadableFile(path, error);
  });
  digester?.update(bytes);
  return digester?.finish();
}

/** The image must say what the manifest will say, and its base must still be whole. */
async function checkDevice(
  context: StoreContext,
  staged: StagedFolder,
  device: StagedDevice,
  signal: AbortSignal,
): Promise<ManifestDevice> {
  const file = deviceFileName(device.name);
  const path = join(staged.folder, file);
  const image = await readImageFile(path);
  checkImage(path, image, device, device.base?.folderName);
  if (device.base !== undefined) await checkBase(context, staged, device.name, device.base, signal);
  const { name, virtualBytes, reason, compression, readBytes, writtenBytes, zeroBytes, base } = device;
  return {
    name,
    file,
    virtualBytes,
    mode: base === undefined ? "full" : "incremental",
    reason: base === undefined ? cutLine(reason) : "",
    ...(base?.uuid === undefined ? {} : { base: { folder: base.folderName, uuid: base.uuid } }),
    compression,
    readBytes,
    writtenBytes,
    zeroBytes,
    headerSha256: image.headerSha256,
  };
}

async function checkBase(
  context: StoreContext,
  staged: StagedFolder,
  device: string,
  promised: { readonly folderName: string; readonly uuid: string | undefined },
  signal: AbortSignal,
): Promise<void> {
  try {
    const base = await openPoint(context, `${staged.name.vmid}/${promised.folderName}`);
    if (base.uuid === undefined || base.uuid !== promised.uuid) {
      throw new BaseUnusableError(`Cannot commit ${device}: its base ${promised.folderName} is another backup now`);
    }
    await resolveChain(context, base, device, signal);
  } catch (error) {
    signal.throwIfAborted();
    if (!(error instanceof HostError) || error instanceof BaseUnusableError) throw error;
    throw new BaseUnusableError(`Cannot commit ${device}: its base is no longer usable: ${error.message}`, {
      cause: error,
    });
  }
}

async function readGuest(staged: StagedFolder, parts: CommitParts): Promise<GuestIdentity> {
  const path = join(staged.folder, GUEST_CONFIG_FILE);
  const config = await readSmallFile(path, MAX_GUEST_CONFIG_BYTES).catch((error: unknown) => {
    if (!(error instanceof JsonProblem) && errnoOf(error) !== "ENOENT") throw environmentError("read", path, error);
    throw new RequestError(`Cannot commit "backup/${staged.name.archive}": ${GUEST_CONFIG_FILE}: ${messageOf(error)}`);
  });
  const vmgenid = parseVmgenid(config);
  return {
    ...(vmgenid === undefined ? {} : { vmgenid }),
    ...(parts.process === undefined ? {} : { process: parts.process }),
  };
}

async function writeManifest(
  context: StoreContext,
  staged: StagedFolder,
  content: Pick<Manifest, "guest" | "devices" | "container" | "files">,
): Promise<Manifest> {
  const { uuid, sequence, name, folder } = staged;
  const bytes = formatManifest({
    uuid,
    sequence,
    vmid: name.vmid,
    type: name.type,
    epoch: name.epoch,
    storeid: context.storeid,
    nodename: context.nodename,
    committedAt: new Date().toISOString(),
    ...content,
  });
  const manifest = parseManifest(bytes); // what we could not read back must not be written
  await context.io.createFile(join(folder, MANIFEST_FILE), bytes);
  await context.io.syncFolder(folder);
  return manifest;
}
