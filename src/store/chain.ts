// SPDX-License-Identifier: AGPL-3.0-or-later
// The chain of images behind one device of a point, checked before anybody reads from it. What a header
// names is compared, never followed.
import { CleanupStack, quote } from "../core/index.ts";
import { formatStamp } from "../host/index.ts";
import { parseArchiveName } from "../pve/index.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { BaseUnusableError, PointDamagedError, PointNotFoundError } from "./errors.ts";
import { backingFileName, deviceFileName } from "./format/layout.ts";
import { isOwnImage, parseLegacyBacking } from "./format/legacy.ts";
import type { ManifestDevice } from "./format/manifest.ts";
import {
  assertUnchanged,
  damagedFile,
  type ImageFile,
  openImageFile,
  refuseShared,
  type Unchanged,
  unreadableFile,
} from "./image-file.ts";
import { openPoint, openPointFolder, type Point, type PointDevice } from "./point.ts";

/** A longer chain is neither made nor read: QEMU opens every file of it, and recurses through it. */
export const MAX_CHAIN_LENGTH = 256;

/** The images behind one device, open: what was checked is what is read. */
export class OpenChain implements AsyncDisposable {
  /** Top first, the full image last. */
  readonly images: readonly ImageFile[];
  /** Names of the points' folders, in the same order. */
  readonly folders: readonly string[];
  /** Virtual size of the top. */
  readonly sizeBytes: number;
  readonly #owned: CleanupStack;

  constructor(links: readonly Link[], sizeBytes: number, owned: CleanupStack) {
    this.images = links.map(({ image }) => image);
    this.folders = links.map(({ folder }) => folder);
    this.sizeBytes = sizeBytes;
    this.#owned = owned;
  }

  /** @throws PointDamagedError if a file is no longer what was opened and checked; EnvironmentError */
  async assertUnchanged(what: Unchanged): Promise<void> {
    for (const image of this.images) await assertUnchanged(image, what);
  }

  /** @throws BaseUnusableError unless `other` consists of the very same files in the same state */
  assertSame(other: OpenChain): void {
    const changed = this.images.find(({ stamp }, at) => {
      const now = other.images[at]?.stamp;
      return now === undefined || formatStamp(now) !== formatStamp(stamp);
    });
    if (changed === undefined && other.images.length === this.images.length) return;
    const path = (changed ?? other.images[0])?.file.path;
    throw new BaseUnusableError(`Cannot build on "${path}": it was changed meanwhile`, {
      hint: "nothing is lost: the next backup is a full one",
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

interface Link {
  readonly folder: string;
  readonly image: ImageFile;
}

/**
 * Opens and checks every file behind a device: a regular file in this guest's folders, with recorded size and
 * header, backed by exactly the recorded base. The tables are not read: see assertSound().
 *
 * @throws PointDamagedError saying which file is wrong and how; PointNotFoundError for an unknown device
 */
export async function openChain(
  context: StoreContext,
  point: Point,
  device: string,
  signal: AbortSignal,
): Promise<OpenChain> {
  const { virtualBytes } = known(point, device);
  await using owned = new CleanupStack();
  const find = point.kind === "complete" ? findComplete : findLegacy;
  const links = await find(context, point, device, owned, signal);
  return new OpenChain(links, virtualBytes, owned.move());
}

function known(point: Point, device: string): PointDevice {
  const found = point.devices.get(device);
  if (found !== undefined) return found;
  throw new PointNotFoundError(`Cannot open device ${quote(device)} of "${point.volname}": it has no such device`);
}

async function findComplete(
  context: StoreContext,
  top: Point,
  device: string,
  owned: CleanupStack,
  signal: AbortSignal,
): Promise<Link[]> {
  const links: Link[] = [];
  for (let point = top; ; ) {
    signal.throwIfAborted();
    if (links.length >= MAX_CHAIN_LENGTH) throw tooLong(top);
    const record = point.manifest?.devices.find((one) => one.name === device);
    const file = point.devices.get(device);
    if (record === undefined || file === undefined) {
      throw new PointDamagedError(`Cannot use "${point.volname}": it does not hold device ${device} of a later backup`);
    }
    await using folder = await openPointFolder(context, point);
    const image = owned.use(await openImageFile(folder, file.file));
    checkRecorded(image, record, point);
    links.push({ folder: point.folderName, image });
    if (record.base === undefined) return links;
    point = await openBase(context, point, record.base);
  }
}

function checkRecorded(image: ImageFile, record: ManifestDevice, point: Point): void {
  const { fileBytes, path } = image.file;
  const sizeBytes = point.manifest?.files.find((file) => file.name === record.file)?.sizeBytes;
  if (fileBytes !== sizeBytes) throw damagedFile(path, `it has ${fileBytes} bytes, ${sizeBytes} are recorded`);
  checkImage(image, record, record.base?.folder);
  if (image.headerSha256 !== record.headerSha256) throw damagedFile(path, "its header is not the recorded one");
}

/** Virtual size and backing of an image against what they must be. */
export function checkImage(
  { file: { path }, header }: ImageFile,
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

async function findLegacy(
  context: StoreContext,
  top: Point,
  device: string,
  owned: CleanupStack,
  signal: AbortSignal,
): Promise<Link[]> {
  const links: Link[] = [];
  const seen = new Set<string>();
  let folder = top.folderName;
  let file = deviceFileName(device);
  for (;;) {
    signal.throwIfAborted();
    if (links.length >= MAX_CHAIN_LENGTH) throw tooLong(top);
    const image = owned.use(await openLegacyImage(context, top, folder, file));
    const { path } = image.file;
    if (seen.has(path)) throw damagedFile(path, "it is its own base");
    seen.add(path);
    if (isOwnImage(image.header)) throw damagedFile(path, "this software wrote it, for another backup");
    links.push({ folder, image });
    const backing = image.header.backing;
    if (backing === undefined) return links;
    const mapped = parseLegacyBacking(top.vmid, backing.file);
    if (mapped === undefined || (backing.format ?? "qcow2") !== "qcow2") {
      throw damagedFile(path, `it names backing file ${quote(backing.file)}, which is not a disk of this guest`);
    }
    ({ folder, file } = mapped);
  }
}

async function openLegacyImage(context: StoreContext, top: Point, folder: string, file: string): Promise<ImageFile> {
  const name = parseArchiveName(`${top.vmid}/${folder}`);
  await using owner = await openPointFolder(context, name).catch((error: unknown) => {
    if (!(error instanceof PointNotFoundError)) throw error;
    throw damagedFile(`${pointFolder(context, top.vmid, folder)}/${file}`, "it is missing");
  });
  const image = await openImageFile(owner, file);
  try {
    refuseShared(image.file);
    return image;
  } catch (error) {
    await image[Symbol.asyncDispose]();
    throw unreadableFile(image.file.path, error);
  }
}

function tooLong(top: Point): PointDamagedError {
  return new PointDamagedError(`Cannot use "${top.volname}": its chain has more than ${MAX_CHAIN_LENGTH} images`);
}
