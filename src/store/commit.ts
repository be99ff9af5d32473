// SPDX-License-Identifier: AGPL-3.0-or-later
// The commit of a point: files synced, manifest last, witness in flight, rename, then the rest.

import { RequestError } from "../core/index.ts";
import { type Digest, tryCreateDigester } from "../digest/index.ts";
import { type ProcessIdentity, type RegularFile, readWhole } from "../host/index.ts";
import { type GuestIdentity, MAX_GUEST_CONFIG_BYTES, parseVmgenid } from "../pve/index.ts";
import type { Base } from "./base.ts";
import { type FileTable, lookAtFiles, occupiedBytesOf } from "./catalog.ts";
import { checkImage } from "./chain.ts";
import { checkSameStore, type StoreContext } from "./context.ts";
import { PointDamagedError } from "./errors.ts";
import { deviceFileName, GUEST_CONFIG_FILE, MANIFEST_FILE } from "./format/layout.ts";
import {
  cutLine,
  formatManifest,
  type Manifest,
  type ManifestContainer,
  type ManifestDevice,
  type ManifestFile,
  parseManifest,
} from "./format/manifest.ts";
import { openImageFile, unreadableFile } from "./image-file.ts";
import type { GuestLock } from "./lock/guest-lock.ts";
import { completePoint, type Point } from "./point.ts";
import { assertOnlyOurs, publish } from "./publish.ts";
import { nextSequence } from "./sequence.ts";
import { takeSnapshot } from "./snapshot.ts";
import type { Staged } from "./staged.ts";

/** What a job reports about one device; the store reads size and header from the file itself. */
export interface StagedDevice {
  readonly name: string;
  readonly virtualBytes: number;
  /** Whether it builds on the base of the job. */
  readonly isIncremental: boolean;
  /** Why all of it was read; empty if only what changed was. */
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
  /** What incremental devices build on. */
  readonly base?: Base | undefined;
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
  staged: Staged,
  parts: CommitParts,
  signal: AbortSignal,
): Promise<Point> {
  await lock.assertHeld();
  await lookAtStaged(staged);
  const files: ManifestFile[] = [];
  for (const name of [...staged.files.keys()].sort()) files.push(await syncFile(context, staged, name, parts));
  const devices: ManifestDevice[] = [];
  for (const device of parts.devices) devices.push(await checkDevice(staged, device, parts.base));
  const guest = guestOf(staged, parts);
  await using now = await takeSnapshot(context, staged.name.vmid, signal);
  await parts.base?.assertCommittable(now, signal);
  const sequence = nextSequence(context, now.entries, now.state);
  const manifest = await writeManifest(context, staged, {
    sequence,
    guest,
    devices,
    ...(parts.container === undefined ? {} : { container: parts.container }),
    files,
  });
  const occupiedBytes = occupiedBytesOf((await lookAtStaged(staged)).values());
  signal.throwIfAborted();
  await checkSameStore(context);
  await publish(context, lock, staged, { guest, sequence, before: now });
  return completePoint(context, staged.name, manifest, occupiedBytes);
}

/** What the job did not write does not get in, and what it wrote is still there. */
async function lookAtStaged(staged: Staged): Promise<FileTable> {
  const { folder } = staged;
  const found = await lookAtFiles(folder, "must stay").catch((error: unknown) => {
    throw unreadableFile(folder.path, error);
  });
  assertOnlyOurs(staged, found);
  return found;
}

/** A file of the point: on the disk, of the reported length, and with its digest. */
async function syncFile(
  context: StoreContext,
  staged: Staged,
  name: string,
  parts: CommitParts,
): Promise<ManifestFile> {
  await using file = await staged.openFile(name);
  const { fileBytes: sizeBytes, handle, path } = file;
  if (name === MANIFEST_FILE) throw new RequestError(`Cannot commit "${path}": a job does not write it`);
  await context.io.syncFile(handle, path);
  const device = parts.devices.find((one) => deviceFileName(one.name) === name);
  if (device !== undefined && device.fileBytes !== sizeBytes) {
    throw new PointDamagedError(`Cannot commit "${path}": it has ${sizeBytes} bytes, ${device.fileBytes} were written`);
  }
  const digest = device?.digest ?? parts.digests?.get(name) ?? (await digestSmallFile(file, staged.written.get(name)));
  return { name, sizeBytes, ...(digest === undefined ? {} : { digest }) };
}

async function digestSmallFile(file: RegularFile, written: Buffer | undefined): Promise<Digest | undefined> {
  if (file.fileBytes > MAX_GUEST_CONFIG_BYTES) return undefined;
  const digester = tryCreateDigester("sha256"); // which every system can compare
  const bytes = await readWhole(file, MAX_GUEST_CONFIG_BYTES).catch((error: unknown) => {
    throw unreadableFile(file.path, error);
  });
  if (written !== undefined && !written.equals(bytes)) {
    throw new PointDamagedError(`Cannot commit "${file.path}": it does not hold what was written to it`);
  }
  digester?.update(bytes);
  return digester?.finish();
}

/** The image must say what the manifest will say. */
async function checkDevice(staged: Staged, device: StagedDevice, base: Base | undefined): Promise<ManifestDevice> {
  const { name, virtualBytes, isIncremental, reason, compression, readBytes, writtenBytes, zeroBytes } = device;
  const below = isIncremental ? base?.point : undefined;
  if (isIncremental && (below?.uuid === undefined || base?.chains.has(name) !== true)) {
    throw new RequestError(`Cannot commit "${name}" as an increment: the job holds no base of it`);
  }
  const file = deviceFileName(name);
  await using image = await openImageFile(staged.folder, file);
  checkImage(image, device, below?.folderName);
  return {
    name,
    file,
    virtualBytes,
    mode: below === undefined ? "full" : "incremental",
    reason: cutLine(reason),
    ...(below?.uuid === undefined ? {} : { base: { folder: below.folderName, uuid: below.uuid } }),
    compression,
    readBytes,
    writtenBytes,
    zeroBytes,
    headerSha256: image.headerSha256,
  };
}

function guestOf(staged: Staged, parts: CommitParts): GuestIdentity {
  const config = staged.written.get(GUEST_CONFIG_FILE);
  if (config === undefined) {
    throw new RequestError(`Cannot commit "backup/${staged.name.archive}": the job did not write ${GUEST_CONFIG_FILE}`);
  }
  const vmgenid = parseVmgenid(config);
  return {
    ...(vmgenid === undefined ? {} : { vmgenid }),
    ...(parts.process === undefined ? {} : { process: parts.process }),
  };
}

async function writeManifest(
  context: StoreContext,
  staged: Staged,
  content: Pick<Manifest, "sequence" | "guest" | "devices" | "container" | "files">,
): Promise<Manifest> {
  const { uuid, name } = staged;
  const bytes = formatManifest({
    uuid,
    vmid: name.vmid,
    type: name.type,
    epoch: name.epoch,
    storeid: context.storeid,
    nodename: context.nodename,
    committedAt: new Date().toISOString(),
    ...content,
  });
  const manifest = parseManifest(bytes); // what we could not read back must not be written
  await staged.writeFile(MANIFEST_FILE, bytes);
  await context.io.syncFolder(staged.folder);
  return manifest;
}
