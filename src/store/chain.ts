// SPDX-License-Identifier: AGPL-3.0-or-later
// The chain of images behind one device of a point, checked before anybody reads from it. What a header
// names is compared, never followed.
import { lstat } from "node:fs/promises";
import { join } from "node:path";
import { environmentError, errnoOf } from "../core/index.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { PointDamagedError, PointNotFoundError } from "./errors.ts";
import { damagedFile, type ImageFile, readImageFile } from "./image-file.ts";
import { backingFileName, deviceFileName, quote } from "./layout.ts";
import { isOwnImage, parseLegacyBacking } from "./legacy.ts";
import type { ManifestDevice } from "./manifest.ts";
import { openPoint, type Point, type PointDevice } from "./point.ts";

/** A longer chain is neither made nor read: QEMU opens every file of it, and recurses through it. */
export const MAX_CHAIN_LENGTH = 256;

export interface ResolvedChain {
  /** Top first, the full image last. */
  readonly paths: readonly string[];
  /** Names of the points' folders, in the same order. */
  readonly folders: readonly string[];
  /** Virtual size of the top. */
  readonly sizeBytes: number;
}

interface Link {
  readonly path: string;
  readonly folder: string;
  readonly image: ImageFile;
}

/**
 * Checks every file behind a device: a regular file in this guest's folders, with recorded size and
 * header, backed by exactly the recorded base. The tables are not read: see assertSound().
 *
 * @throws PointDamagedError saying which file is wrong and how; PointNotFoundError for an unknown device
 */
export async function resolveChain(
  context: StoreContext,
  point: Point,
  device: string,
  signal: AbortSignal,
): Promise<ResolvedChain> {
  const { virtualBytes } = known(point, device);
  const find = point.kind === "complete" ? findComplete : findLegacy;
  const links = await find(context, point, device, signal);
  return {
    paths: links.map((link) => link.path),
    folders: links.map((link) => link.folder),
    sizeBytes: virtualBytes,
  };
}

function known(point: Point, device: string): PointDevice {
  const found = point.devices.get(device);
  if (found !== undefined) return found;
  throw new PointNotFoundError(`Cannot open device ${quote(device)} of "${point.volname}": it has no such device`);
}

async function findComplete(context: StoreContext, top: Point, device: string, signal: AbortSignal): Promise<Link[]> {
  const links: Link[] = [];
  for (let point = top; ; ) {
    signal.throwIfAborted();
    if (links.length >= MAX_CHAIN_LENGTH) throw tooLong(top);
    const record = point.manifest?.devices.find((one) => one.name === device);
    const file = point.devices.get(device);
    if (record === undefined || file === undefined) {
      throw new PointDamagedError(`Cannot use "${point.volname}": it does not hold device ${device} of a later backup`);
    }
    const image = await readImageFile(file.path);
    checkRecorded(file.path, image, record, point);
    links.push({ path: file.path, folder: point.folderName, image });
    if (record.base === undefined) return links;
    point = await openBase(context, point, record.base);
  }
}

function checkRecorded(path: string, image: ImageFile, record: ManifestDevice, point: Point): void {
  const sizeBytes = point.manifest?.files.find((file) => file.name === record.file)?.sizeBytes;
  if (image.fileBytes !== sizeBytes) {
    throw damagedFile(path, `it has ${image.fileBytes} bytes, ${sizeBytes} are recorded`);
  }
  checkImage(path, image, record, record.base?.folder);
  if (image.headerSha256 !== record.headerSha256) throw damagedFile(path, "its header is not the recorded one");
}

/** Virtual size and backing of an image against what they must be. */
export function checkImage(
  path: string,
  { header }: ImageFile,
  device: { readonly name: string; readonly virtualBytes: number },
  baseFolder: string | undefined,
): void {
  if (header.virtualBytes !== device.virtualBytes) {
    throw damagedFile(path, `its virtual size is ${header.virtualBytes}, ${device.virtualBytes} is recorded`);
  }
  const backing = baseFolder === undefined ? undefined : backingFileName(baseFolder, device.name);
  if (header.backing?.file !== backing) {
    const found = header.backing === undefined ? "no backing file" : `backing file ${quote(header.backing.file)}`;
    throw damagedFile(path, `it names ${found}, ${backing === undefined ? "none" : `"${backing}"`} is recorded`);
  }
  if (backing !== undefined && header.backing?.format !== "qcow2") {
    throw damagedFile(path, "its backing format is not qcow2");
  }
}

async function openBase(
  context: StoreContext,
  child: Point,
  recorded: { readonly folder: string; readonly uuid: string },
): Promise<Point> {
  const base = await openPoint(context, `${child.vmid}/${recorded.folder}`).catch((error: unknown) => {
    if (!(error instanceof PointNotFoundError)) throw error;
    throw new PointDamagedError(`Cannot use "${child.volname}": its base ${recorded.folder} is missing`, {
      cause: error,
    });
  });
  if (base.uuid !== recorded.uuid) {
    throw new PointDamagedError(
      `Cannot use "${child.volname}": its base ${recorded.folder} is another backup (${base.uuid ?? "without UUID"}), ` +
        `${recorded.uuid} is recorded`,
    );
  }
  // Strictly falling, so no cycle can pass.
  if (base.sequence === undefined || child.sequence === undefined || base.sequence >= child.sequence) {
    throw new PointDamagedError(`Cannot use "${child.volname}": its base ${recorded.folder} is not older than it`);
  }
  return base;
}

async function findLegacy(context: StoreContext, top: Point, device: string, signal: AbortSignal): Promise<Link[]> {
  const links: Link[] = [];
  const seen = new Set<string>();
  let folder = top.folderName;
  let file = deviceFileName(device);
  for (;;) {
    signal.throwIfAborted();
    if (links.length >= MAX_CHAIN_LENGTH) throw tooLong(top);
    const parent = pointFolder(context, top.vmid, folder);
    const path = join(parent, file);
    if (seen.has(path)) throw damagedFile(path, "it is its own base");
    seen.add(path);
    if (!(await isFolder(parent))) throw damagedFile(path, "it is missing");
    const image = await readImageFile(path);
    if (isOwnImage(image.header)) throw damagedFile(path, "this software wrote it, for another backup");
    links.push({ path, folder, image });
    const backing = image.header.backing;
    if (backing === undefined) return links;
    const mapped = parseLegacyBacking(top.vmid, backing.file);
    if (mapped === undefined || (backing.format ?? "qcow2") !== "qcow2") {
      throw damagedFile(path, `it names backing file ${quote(backing.file)}, which is no disk of this guest`);
    }
    ({ folder, file } = mapped);
  }
}

async function isFolder(path: string): Promise<boolean> {
  return await lstat(path).then(
    (found) => found.isDirectory(),
    (error: unknown) => {
      if (errnoOf(error) === "ENOENT") return false;
      throw environmentError("look at", path, error);
    },
  );
}

function tooLong(top: Point): PointDamagedError {
  return new PointDamagedError(`Cannot use "${top.volname}": its chain has more than ${MAX_CHAIN_LENGTH} images`);
}
