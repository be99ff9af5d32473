// SPDX-License-Identifier: AGPL-3.0-or-later
// One container restore: the tar archive as it lies in the store, or the squashfs image as a folder.
import { CleanupStack, RequestError } from "../core/index.ts";
import { mountSquashfs, sweepRawViews } from "../device/index.ts";
import type { Point, Store } from "../store/index.ts";
import type { ContainerOffer } from "./backup-provider.ts";

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
  readonly #owned: CleanupStack;

  private constructor(offer: ContainerOffer, owned: CleanupStack) {
    this.offer = offer;
    this.#owned = owned;
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
    if (mechanism === "tar") return new ContainerRestore({ tarPath: archive }, stack.move());
    const view = stack.use(await mountSquashfs({ image: archive, runDir, signal }));
    return new ContainerRestore({ archiveDirectory: view.path }, stack.move());
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
