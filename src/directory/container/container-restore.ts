// SPDX-License-Identifier: AGPL-3.0-or-later
// One container restore: the tar archive as it is in the store, or the squashfs image as a directory.
import { symlink } from "node:fs/promises";
import path from "node:path";
import { CleanupStack, environmentError } from "../../core/index.ts";
import { type DirectoryView, mountSquashfs, sweepRawViews, ViewFolder } from "../../device/index.ts";
import { type FileStamp, type RegularFile, readStamp } from "../../host/index.ts";
import { assertContainerRestorable, containerArchiveOf } from "../../maintenance/index.ts";
import type { ContainerOffer } from "../../provider/index.ts";
import { parseArchiveName } from "../../pve/index.ts";
import { assertUnchanged, type GuestPoints, type HeldChains, type Point, type Store } from "../../store/index.ts";
import { describeTellingKeys } from "../config-warnings.ts";
import { ContentCheck, notVerified } from "../content-check.ts";
import { assertStillServed } from "../still-served.ts";

interface ContainerRestoreEnvironment {
  readonly store: Store;
  /** Directory for mounts; what killed processes left in it is swept first. */
  readonly runDir: string;
  /** Whether what is read is compared with the recorded checksum. */
  readonly isVerified: boolean;
  readonly warn: (message: string) => void;
}

/** Open from the check to the end: what was checked is what is read. */
interface Archive {
  readonly file: RegularFile;
  /** As it was before the check. */
  readonly stamp: FileStamp;
}

interface RestoreParts {
  readonly offer: ContainerOffer;
  readonly archive: Archive;
  readonly held: HeldChains;
  readonly view?: DirectoryView;
  readonly check: ContentCheck | undefined;
}

/** Decides from the store alone: every process gives the same answer. @throws RequestError if there is no archive */
export function containerMechanism(point: Point): "tar" | "directory" {
  return containerArchiveOf(point).endsWith(".sqfs") ? "directory" : "tar";
}

/** Holds the backup's lock and the mount until it is disposed. */
export class ContainerRestore implements AsyncDisposable {
  readonly offer: ContainerOffer;
  readonly #volname: string;
  readonly #archive: Archive;
  readonly #held: HeldChains;
  readonly #owned: CleanupStack;
  /** Undefined for an archive that PVE reads itself. */
  readonly #view: DirectoryView | undefined;
  readonly #check: ContentCheck | undefined;

  private constructor(volname: string, parts: RestoreParts, owned: CleanupStack) {
    this.offer = parts.offer;
    this.#volname = volname;
    this.#archive = parts.archive;
    this.#held = parts.held;
    this.#owned = owned;
    this.#view = parts.view;
    this.#check = parts.check;
  }

  static async open(
    { store, runDir, isVerified, warn }: ContainerRestoreEnvironment,
    points: GuestPoints,
    volname: string,
    signal: AbortSignal,
  ): Promise<ContainerRestore> {
    await sweepRawViews(runDir, warn);
    const point = await points.point(parseArchiveName(volname));
    const mechanism = containerMechanism(point);
    await using stack = new CleanupStack();
    const held = stack.use(await store.holdChains(points, volname, signal));
    const file = stack.use(await point.openFile(containerArchiveOf(point)));
    const archive = { file, stamp: await readStamp(file.handle) };
    await assertContainerRestorable(point, file, signal);
    const warning = describeTellingKeys(point.volname, "lxc", await point.guestConfig());
    if (warning !== undefined) warn(warning);
    if (!isVerified) warn(notVerified(point.volname));
    const compare = (): ContentCheck | undefined => {
      const digest = point.manifest?.files.find(({ name }) => name === containerArchiveOf(point))?.digest;
      return isVerified ? stack.use(new ContentCheck(volname, [{ file, digest }], warn)) : undefined;
    };
    if (mechanism === "tar") {
      const folder = stack.use(await ViewFolder.create(runDir));
      const tarPath = await linkTo(file, folder);
      const parts = { offer: { tarPath }, archive, held, check: compare() };
      return new ContainerRestore(volname, parts, stack.move());
    }
    const view = stack.use(await mountSquashfs({ image: file, runDir, signal }));
    if (view.fallbackReason !== undefined) warn(describeFallback(volname, view.fallbackReason));
    const parts = { offer: { archiveDirectory: view.path }, archive, held, view, check: compare() };
    return new ContainerRestore(volname, parts, stack.move());
  }

  /**
   * Takes back what was on offer.
   *
   * @throws ChildProcessError if the directory was no longer served; PointDamagedError if the archive is not what was
   *   written; LockedError, PointDamagedError if what was read may
   *   have been changed or removed meanwhile
   */
  async withdraw(): Promise<void> {
    await using stack = new CleanupStack();
    stack.use(this);
    await assertStillServed(this.#volname, this.#view);
    await this.#held.assertHeld();
    await assertUnchanged(this.#archive, "content");
    await this.#check?.finish();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

/**
 * PVE opens a tar by its name. This name is in a directory that only root may enter, and leads to the descriptor that
 * was checked, whatever the archive's name leads to by now. It ends with this process.
 */
async function linkTo(file: RegularFile, folder: ViewFolder): Promise<string> {
  const link = path.join(folder.path, path.basename(file.path));
  try {
    await symlink(`/proc/${process.pid}/fd/${file.handle.fd}`, link);
    return link;
  } catch (error) {
    throw environmentError("create", link, error);
  }
}

/** Debian 12's squashfuse 0.1.105 gives attributes of security.* the names of trusted.*, and vice versa. */
function describeFallback(volname: string, reason: string): string {
  const container = `The kernel cannot mount ${JSON.stringify(volname)} (${reason}), so squashfuse serves it`;
  return `${container}: extended attributes such as file capabilities may be lost. Check them (getcap -r) after the restore`;
}
