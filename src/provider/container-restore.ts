// SPDX-License-Identifier: AGPL-3.0-or-later
// One container restore: the tar archive as it lies in the store, or the squashfs image as a folder.
import { inspectArchive } from "../archive/index.ts";
import { CleanupStack, RequestError } from "../core/index.ts";
import { type DirectoryView, mountSquashfs, sweepRawViews } from "../device/index.ts";
import { openRegularFile } from "../host/index.ts";
import type { Point, Store } from "../store/index.ts";
import type { ContainerOffer } from "./backup-provider.ts";
import { mustVouch } from "./vouch.ts";

export interface ContainerRestoreEnvironment {
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
  readonly #owned: CleanupStack;
  /** Undefined for an archive that PVE reads itself. */
  readonly #view: DirectoryView | undefined;

  private constructor(volname: string, offer: ContainerOffer, owned: CleanupStack, view?: DirectoryView) {
    this.offer = offer;
    this.#volname = volname;
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
    stack.use(await store.lockChainShared(point, signal));
    const archive = archiveOf(point);
    // Nothing was recorded of it: one that was cut off where a member ends, tar would take for a whole one.
    await using file = await openRegularFile(archive);
    if (point.manifest === undefined) await inspectArchive(file, signal);
    if (mechanism === "tar") return new ContainerRestore(volname, { tarPath: archive }, stack.move());
    const view = stack.use(await mountSquashfs({ image: file, runDir, signal }));
    if (view.fallbackReason !== undefined) warn(describeFallback(volname, view.fallbackReason));
    return new ContainerRestore(volname, { archiveDirectory: view.path }, stack.move(), view);
  }

  /**
   * Takes back what was on offer.
   *
   * @throws ChildProcessError if the folder was served no longer
   */
  async withdraw(): Promise<void> {
    await using stack = new CleanupStack();
    stack.use(this);
    await mustVouch(this.#volname, this.#view);
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

/** Debian 12's squashfuse 0.1.105 gives attributes of security.* the names of trusted.*, and the other way round. */
function describeFallback(volname: string, reason: string): string {
  const container = `The kernel cannot mount ${JSON.stringify(volname)} (${reason}), so squashfuse serves it`;
  return `${container}: extended attributes such as file capabilities may be lost. Check them (getcap -r) after the restore`;
}
