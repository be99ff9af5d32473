// SPDX-License-Identifier: AGPL-3.0-or-later
// One container restore: the tar archive as it lies in the store, or the squashfs image as a folder.
import { symlink } from "node:fs/promises";
import path from "node:path";
import { inspectArchive, verifyArchive } from "../../archive/index.ts";
import { CleanupStack, environmentError, RequestError } from "../../core/index.ts";
import { type DirectoryView, mountSquashfs, sweepRawViews, ViewFolder } from "../../device/index.ts";
import type { RegularFile } from "../../host/index.ts";
import type { ContainerOffer } from "../../provider/index.ts";
import { type ChainLock, type Point, PointDamagedError, type Store } from "../../store/index.ts";
import { describeTellingKeys } from "../config-warnings.ts";
import { mustVouch } from "../vouch.ts";

interface ContainerRestoreEnvironment {
  readonly store: Store;
  /** Folder for mounts; what killed processes left in it is swept first. */
  readonly runDir: string;
  readonly warn: (message: string) => void;
}

/** Decides from the store alone: every process gives the same answer. @throws RequestError if there is no archive */
export function containerMechanism(point: Point): "tar" | "directory" {
  return archiveOf(point).endsWith(".sqfs") ? "directory" : "tar";
}

/** Holds the backup's lock and the mount until it is disposed. */
export class ContainerRestore implements AsyncDisposable {
  readonly offer: ContainerOffer;
  readonly #volname: string;
  readonly #lock: ChainLock;
  readonly #owned: CleanupStack;
  /** Undefined for an archive that PVE reads itself. */
  readonly #view: DirectoryView | undefined;

  private constructor(
    volname: string,
    offer: ContainerOffer,
    lock: ChainLock,
    owned: CleanupStack,
    view: DirectoryView | undefined,
  ) {
    this.offer = offer;
    this.#volname = volname;
    this.#lock = lock;
    this.#owned = owned;
    this.#view = view;
  }

  static async open(
    { store, runDir, warn }: ContainerRestoreEnvironment,
    volname: string,
    signal: AbortSignal,
  ): Promise<ContainerRestore> {
    await sweepRawViews(runDir, warn);
    const point = await store.openPoint(volname, signal);
    const mechanism = containerMechanism(point);
    await using stack = new CleanupStack();
    const lock = stack.use(await store.lockChainShared(point, signal));
    const file = stack.use(await point.openFile(archiveOf(point)));
    await checkUnrecorded(point, file, signal);
    const warning = describeTellingKeys(point.volname, "lxc", await point.guestConfig());
    if (warning !== undefined) warn(warning);
    if (mechanism === "tar") {
      const folder = stack.use(await ViewFolder.create(runDir));
      return new ContainerRestore(volname, { tarPath: await linkTo(file, folder) }, lock, stack.move(), undefined);
    }
    const view = stack.use(await mountSquashfs({ image: file, runDir, signal }));
    if (view.fallbackReason !== undefined) warn(describeFallback(volname, view.fallbackReason));
    return new ContainerRestore(volname, { archiveDirectory: view.path }, lock, stack.move(), view);
  }

  /**
   * Takes back what was on offer.
   *
   * @throws ChildProcessError if the folder was served no longer; LockedError if somebody may have removed it meanwhile
   */
  async withdraw(): Promise<void> {
    await using stack = new CleanupStack();
    stack.use(this);
    await mustVouch(this.#volname, this.#view);
    await this.#lock.assertHeld();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

function archiveOf(point: Point): string {
  if (point.type === "lxc" && point.containerArchive !== undefined) return point.containerArchive;
  throw new RequestError(
    `Cannot restore "${point.volname}" as a container: ${point.type === "lxc" ? "it has no archive" : "it is the backup of a VM"}`,
  );
}

/**
 * What no digest was compared of is looked at first: an archive that was cut off where a member ends, tar would take for
 * a whole one, and one with a second name may be a file of somebody else.
 */
async function checkUnrecorded(point: Point, file: RegularFile, signal: AbortSignal): Promise<void> {
  if (point.manifest === undefined) await inspectArchive(file, signal);
  if (file.links === 1) return;
  const digest = point.manifest?.files.find(({ name }) => name === path.basename(file.path))?.digest;
  if (digest !== undefined && (await verifyArchive(file, digest, signal))) return;
  throw new PointDamagedError(`Cannot use "${file.path}": it has ${file.links} names, and is not the recorded archive`);
}

/**
 * PVE opens a tar by its name. This one lies in a folder of root's alone and leads to the descriptor that was checked,
 * whatever the archive's own name leads to by now. It ends with this process.
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

/** Debian 12's squashfuse 0.1.105 gives attributes of security.* the names of trusted.*, and the other way round. */
function describeFallback(volname: string, reason: string): string {
  const container = `The kernel cannot mount ${JSON.stringify(volname)} (${reason}), so squashfuse serves it`;
  return `${container}: extended attributes such as file capabilities may be lost. Check them (getcap -r) after the restore`;
}
