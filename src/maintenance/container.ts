// SPDX-License-Identifier: AGPL-3.0-or-later
// What Proxmox VE requires of a container's backup before it restores one, and what a restore has to look at first.
import { type ArchiveContents, inspectArchive } from "../archive/index.ts";
import { ChildProcessError, RequestError, UnsupportedError } from "../core/index.ts";
import { verifyFile } from "../digest/index.ts";
import { type ManifestFile, type Point, PointDamagedError } from "../store/index.ts";

/** A file of a point, open. */
export type PointFile = Awaited<ReturnType<Point["openFile"]>>;
export type RecordedDigest = NonNullable<ManifestFile["digest"]>;

/** Source: pve-container, PVE::LXC::Create, check of a tar archive that a backup provider hands over. */
const FEWEST_MEMBERS = 10;
/** How a tool says that it was killed: then nothing is known about the archive. */
const WAS_KILLED = / was ended by SIG[A-Z]+/;

/**
 * Why `pct restore` refuses an archive; undefined if it does not. It does not examine a directory, which is what a
 * squashfs image is restored from.
 *
 * @returns the end of a sentence that begins with the archive
 */
export function pveRefusal(
  archiveName: string,
  { hasSbin, members }: Pick<ArchiveContents, "hasSbin" | "members">,
): string | undefined {
  if (archiveName.endsWith(".sqfs")) return undefined;
  if (!hasSbin) return 'it has no directory or link "sbin" at its top';
  if (members < FEWEST_MEMBERS) return `it has ${members} members, fewer than ${FEWEST_MEMBERS}`;
  return undefined;
}

/** Name of a container's archive. @throws RequestError for the backup of a VM, and where there is no archive */
export function containerArchiveOf(point: Point): string {
  if (point.type === "lxc" && point.containerArchive !== undefined) return point.containerArchive;
  const state = point.type === "lxc" ? "it has no archive" : "it is the backup of a VM";
  throw new RequestError(`Cannot restore "${point.volname}" as a container: ${state}`);
}

/**
 * What a restore must know before it begins; far less than verifyPoint(): an archive with a record is not read. One
 * without a record is listed to its end, because tar takes one that was cut off between two members for a complete
 * one. One with a second name may be a file from outside the store, and must have the recorded digest.
 *
 * @param file the point's archive, borrowed
 * @throws UnsupportedError if Proxmox VE would refuse it; PointDamagedError; EnvironmentError; the reason of `signal`
 */
export async function assertContainerRestorable(point: Point, file: PointFile, signal: AbortSignal): Promise<void> {
  const name = containerArchiveOf(point);
  const contents = point.manifest === undefined ? await listArchive(file, signal) : point.manifest.container;
  if (contents !== undefined) refuseUnrestorable(point, name, contents);
  const expectedBytes = point.manifest?.files.find((one) => one.name === name)?.sizeBytes ?? file.fileBytes;
  if (file.fileBytes !== expectedBytes) {
    throw new PointDamagedError(`Cannot use "${file.path}": it has ${file.fileBytes} bytes, expected ${expectedBytes}`);
  }
  if (file.links === 1) return;
  const recorded = recordedDigest(point, name);
  if (recorded !== undefined && (await verifyFile(file, recorded, signal))) return;
  throw new PointDamagedError(
    `Cannot use "${file.path}": it has ${file.links} names (hard links) and is not the recorded archive`,
  );
}

/** @throws UnsupportedError */
export function refuseUnrestorable(
  point: Point,
  name: string,
  contents: Pick<ArchiveContents, "hasSbin" | "members">,
): void {
  const refusal = pveRefusal(name, contents);
  if (refusal === undefined) return;
  throw new UnsupportedError(`Cannot restore "${point.volname}": Proxmox VE refuses ${name}: ${refusal}`, {
    hint: "its files can be unpacked with tar",
  });
}

/**
 * Lists an archive to its end, with the tools that restore it.
 *
 * @throws PointDamagedError if it was read and is wrong; EnvironmentError if it could not be read; ChildProcessError if a
 *   tool is missing or was killed; the reason of `signal`
 */
export async function listArchive(file: PointFile, signal: AbortSignal): Promise<ArchiveContents> {
  try {
    return await inspectArchive(file, signal);
  } catch (error) {
    if (!(error instanceof ChildProcessError) || error.hint !== undefined || WAS_KILLED.test(error.message))
      throw error;
    await verifyFile(file, { algorithm: "sha256", value: "" }, signal); // reads it: what cannot be read is not damaged
    throw new PointDamagedError(error.message, { cause: error });
  }
}

export function recordedDigest(point: Point, file: string): RecordedDigest | undefined {
  return point.manifest?.files.find(({ name }) => name === file)?.digest;
}
