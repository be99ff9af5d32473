// SPDX-License-Identifier: AGPL-3.0-or-later
// The chain of images behind one device of a point, checked before anything is read from it. What a header names is
// compared, never followed.
import { CleanupStack, NotFoundError, quote } from "../core/index.ts";
import type { Digest } from "../digest/index.ts";
import { type Folder, isSameFile, type RegularFile } from "../host/index.ts";
import { type ArchiveName, parseArchiveName } from "../pve/index.ts";
import type { Qcow2Header } from "../qcow2/index.ts";
import { PointDamagedError } from "./errors.ts";
import { backingFileName, deviceFileName, digestsFileName } from "./format/layout.ts";
import { isOwnImage, parseLegacyBacking } from "./format/legacy.ts";
import type { ManifestBase, ManifestDevice } from "./format/manifest.ts";
import type { GuestPoints } from "./guest-points.ts";
import {
  assertUnchanged,
  damagedFile,
  type ImageFile,
  openImageFile,
  refuseShared,
  type Unchanged,
  unreadableFile,
} from "./image-file.ts";
import type { Point, PointDevice } from "./point.ts";

/** A longer chain is neither made nor read: QEMU opens every file of it and recurses through it. */
export const MAX_CHAIN_LENGTH = 256;

/** One image of a chain, in the directory of its point. */
interface Link {
  readonly image: ImageFile;
  readonly point: ArchiveName;
  /** The point's directory; borrowed. */
  readonly folder: Folder;
  readonly fileName: string;
  /** Whether all of the device was read for it, whatever a bitmap said. */
  readonly isReadAll?: boolean;
  /** Of the image, as its point records it; legacy points record none. */
  readonly checksum?: Digest | undefined;
  /** Its file of block digests; undefined if the point has none. */
  readonly digests?: RecordedDigests | undefined;
}

/** A file of block digests, as the manifest of its point records it. */
export interface RecordedDigests {
  /** The point's directory; borrowed. */
  readonly folder: Folder;
  readonly name: string;
  readonly sizeBytes: number;
  /** Of the point. */
  readonly uuid: string;
}

/** The images behind one device, open: what was checked is what is read. */
export class OpenChain implements AsyncDisposable {
  /** Virtual size of the top. */
  readonly sizeBytes: number;
  readonly #links: readonly Link[];
  readonly #owned: CleanupStack;

  constructor(links: readonly Link[], sizeBytes: number, owned: CleanupStack) {
    this.#links = links;
    this.sizeBytes = sizeBytes;
    this.#owned = owned;
  }

  /** Top first, the full image last. */
  get images(): ImageFile[] {
    return this.#links.map(({ image }) => image);
  }

  /** The same for a reader of the disk. */
  get files(): RegularFile[] {
    return this.#links.map(({ image }) => image.file);
  }

  /** What is recorded of the images' content, in the same order. */
  get checksums(): Array<Digest | undefined> {
    return this.#links.map(({ checksum }) => checksum);
  }

  /** What was read when the images were opened. */
  get headers(): Qcow2Header[] {
    return this.#links.map(({ image }) => image.header);
  }

  /** The block digests of the images, in the same order. */
  get digests(): Array<RecordedDigests | undefined> {
    return this.#links.map(({ digests }) => digests);
  }

  /** True if all images have them: then the content of the disk is known. */
  get hasDigests(): boolean {
    return this.#links.every(({ digests }) => digests !== undefined);
  }

  /** Unix time of the newest backup for which all of the device was read; undefined for legacy points. */
  get lastReadAll(): number | undefined {
    return this.#links.find(({ isReadAll }) => isReadAll === true)?.point.epoch;
  }

  /** The points that hold the images, in the same order. */
  get points(): ArchiveName[] {
    return this.#links.map(({ point }) => point);
  }

  /** @throws PointDamagedError if a file is no longer what was opened and checked; EnvironmentError */
  async assertUnchanged(what: Unchanged): Promise<void> {
    for (const { image } of this.#links) await assertUnchanged(image, what);
  }

  /** @throws PointDamagedError if another file has the name of one that is open, or none; EnvironmentError */
  async assertInPlace(): Promise<void> {
    for (const { image, folder, fileName } of this.#links) {
      const { path } = image.file;
      const now = await folder.look(fileName).catch((error: unknown) => {
        throw unreadableFile(path, error);
      });
      if (now === undefined) throw damagedFile(path, "it is missing");
      if (!isSameFile(now, image.stamp)) throw damagedFile(path, "another file took its place");
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

/**
 * Opens and checks every file behind a device: a regular file in this guest's directories, with recorded size and
 * header, backed by exactly the recorded base. The tables are not read: see assertSound().
 *
 * @param points must outlive the chain
 * @throws PointDamagedError saying which file is wrong and how; NotFoundError for an unknown device
 */
export async function openChain(
  points: GuestPoints,
  point: Point,
  device: string,
  signal: AbortSignal,
): Promise<OpenChain> {
  const { virtualBytes } = known(point, device);
  await using owned = new CleanupStack();
  const links: Link[] = [];
  let step: Step | undefined =
    point.kind === "complete" ? recordedStep(points, point, device) : legacyStep(points, point, deviceFileName(device));
  while (step !== undefined) {
    signal.throwIfAborted();
    if (links.length >= MAX_CHAIN_LENGTH) throw tooLong(point);
    const { link, next }: Found = await step(owned);
    links.push(link);
    step = next;
  }
  return new OpenChain(links, virtualBytes, owned.move());
}

/** Opens one image, which `owned` then owns, and tells where the one below it is. */
type Step = (owned: CleanupStack) => Promise<Found>;

interface Found {
  readonly link: Link;
  /** Undefined after the full image. */
  readonly next: Step | undefined;
}

function known(point: Point, device: string): PointDevice {
  const found = point.devices.get(device);
  if (found !== undefined) return found;
  throw new NotFoundError(`Cannot open device ${quote(device)} of "${point.volname}": it has no such device`);
}

function recordedStep(points: GuestPoints, point: Point, device: string): Step {
  return async (owned) => {
    const record = point.manifest?.devices.find((one) => one.name === device);
    if (record === undefined) {
      throw new PointDamagedError(`Cannot use "${point.volname}": it does not hold device ${device} of a later backup`);
    }
    const folder = await points.folder(point);
    const image = owned.use(await openImageFile(folder, record.file));
    checkRecorded(image, record, point);
    const checksum = point.manifest?.files.find((file) => file.name === record.file)?.digest;
    const digests = recordedDigests(point, folder, device);
    const isReadAll = record.reason !== "";
    const link = { image, point, folder, fileName: record.file, isReadAll, checksum, digests };
    if (record.base === undefined) return { link, next: undefined };
    return { link, next: recordedStep(points, await baseOf(points, point, record.base), device) };
  };
}

function recordedDigests({ manifest }: Point, folder: Folder, device: string): RecordedDigests | undefined {
  const name = digestsFileName(device);
  const sizeBytes = manifest?.files.find((file) => file.name === name)?.sizeBytes;
  if (manifest === undefined || sizeBytes === undefined) return undefined;
  return { folder, name, sizeBytes, uuid: manifest.uuid };
}

function checkRecorded(image: ImageFile, record: ManifestDevice, point: Point): void {
  const { fileBytes, path } = image.file;
  const sizeBytes = point.manifest?.files.find((file) => file.name === record.file)?.sizeBytes;
  if (fileBytes !== sizeBytes) throw damagedFile(path, `it has ${fileBytes} bytes, expected ${sizeBytes}`);
  checkImage(image, record, record.base?.folder);
  if (image.headerSha256 !== record.headerSha256) throw damagedFile(path, "header checksum mismatch (sha256)");
}

/** Compares the virtual size and backing of an image with what they must be. */
export function checkImage(
  { file: { path }, header }: ImageFile,
  device: { readonly name: string; readonly virtualBytes: number },
  baseFolder: string | undefined,
): void {
  if (header.virtualBytes !== device.virtualBytes) {
    throw damagedFile(path, `its virtual size is ${header.virtualBytes}, expected ${device.virtualBytes}`);
  }
  const backing = baseFolder === undefined ? undefined : backingFileName(baseFolder, device.name);
  if (header.backing?.file !== backing) {
    const found = header.backing === undefined ? "no backing file" : `backing file ${quote(header.backing.file)}`;
    throw damagedFile(path, `it names ${found}, expected ${backing === undefined ? "none" : `"${backing}"`}`);
  }
  if (backing !== undefined && header.backing?.format !== "qcow2") {
    throw damagedFile(path, "its backing format is not qcow2");
  }
}

async function baseOf(points: GuestPoints, child: Point, recorded: ManifestBase): Promise<Point> {
  const name = parseArchiveName(`${child.vmid}/${recorded.folder}`);
  const base = await points.point(name).catch((error: unknown) => {
    if (!(error instanceof NotFoundError)) throw error;
    throw new PointDamagedError(`Cannot use "${child.volname}": its base ${recorded.folder} is missing`, {
      cause: error,
    });
  });
  if (base.uuid !== recorded.uuid) {
    throw new PointDamagedError(
      `Cannot use "${child.volname}": its base ${recorded.folder} is another backup (${base.uuid ?? "without UUID"}), ` +
        `expected ${recorded.uuid}`,
    );
  }
  // Strictly falling, so no cycle can pass.
  if (base.sequence === undefined || child.sequence === undefined || base.sequence >= child.sequence) {
    throw new PointDamagedError(`Cannot use "${child.volname}": its base ${recorded.folder} is not older than it`);
  }
  return base;
}

/** Goes by what the header names, mapped into this guest's directories. @param seen paths of the images above */
function legacyStep(points: GuestPoints, point: ArchiveName, fileName: string, seen = new Set<string>()): Step {
  return async (owned) => {
    const folder = await points.folder(point).catch((error: unknown) => {
      if (!(error instanceof NotFoundError)) throw error;
      throw damagedFile(`${points.pathOf(point)}/${fileName}`, "it is missing");
    });
    const image = owned.use(await openImageFile(folder, fileName));
    const { path } = image.file;
    try {
      refuseShared(image.file);
    } catch (error) {
      throw unreadableFile(path, error);
    }
    if (seen.has(path)) throw damagedFile(path, "it is its own base");
    if (isOwnImage(image.header)) throw damagedFile(path, "this software wrote it, for another backup");
    const link = { image, point, folder, fileName };
    const { backing } = image.header;
    if (backing === undefined) return { link, next: undefined };
    const mapped = parseLegacyBacking(point.vmid, backing.file);
    if (mapped === undefined || (backing.format ?? "qcow2") !== "qcow2") {
      throw damagedFile(path, `it names backing file ${quote(backing.file)}, which is not a disk of this guest`);
    }
    const below = parseArchiveName(`${point.vmid}/${mapped.folder}`);
    return { link, next: legacyStep(points, below, mapped.file, seen.add(path)) };
  };
}

function tooLong(top: Point): PointDamagedError {
  return new PointDamagedError(`Cannot use "${top.volname}": its chain has more than ${MAX_CHAIN_LENGTH} images`);
}
