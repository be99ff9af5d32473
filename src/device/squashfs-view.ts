// SPDX-License-Identifier: AGPL-3.0-or-later
// The content of a squashfs image as a read-only directory. Anyone who can write to the share may have made the image,
// and could attack the kernel if the kernel read it; so squashfuse reads it, as the user nobody. Where squashfuse loses
// attributes (Debian 12), the kernel reads it instead, and squashfuse only if the kernel cannot (inside a container).
import { mkdir } from "node:fs/promises";
import path from "node:path";
import { ChildProcessError, CleanupStack, EnvironmentError, environmentError } from "../core/index.ts";
import type { ChildProcess, RegularFile } from "../host/index.ts";
import { mountsBelow } from "./mounts.ts";
import { type FuseMount, keepsAttributes, openFuseMount, serveSquashfs } from "./squashfs-fuse.ts";
import { mountByKernel } from "./squashfs-kernel.ts";
import { ViewFolder } from "./view-folder.ts";

const MOUNT_FLAGS = "ro,nosuid,nodev";

type SquashfsMechanism = "kernel" | "squashfuse";

/** A directory that exists until it is disposed. */
export interface DirectoryView extends AsyncDisposable {
  readonly path: string;
  /** Why it is served by a squashfuse that loses attributes; undefined if no attributes are lost. */
  readonly fallbackReason: string | undefined;
  /**
   * What happened to the mount, if it no longer serves. A reader may not have noticed: without the mount there is an
   * empty directory, and tar makes an empty archive of it and succeeds.
   */
  findTrouble(): Promise<string | undefined>;
}

interface SquashfsOptions {
  /** Borrowed until the view exists. */
  readonly image: RegularFile;
  /** Directory for mounts, on a local file system; created if missing. */
  readonly runDir: string;
  /** Default: what is safe and loses nothing; failing that, what is available. */
  readonly mechanism?: SquashfsMechanism;
  readonly signal: AbortSignal;
}

/**
 * Mounts an image read-only, without setuid and devices, in its own directory. Owners are those in the image.
 *
 * @throws ChildProcessError if no way works; EnvironmentError if `runDir` cannot be written; the abort reason of
 *   `signal`
 */
export async function mountSquashfs({ image, runDir, mechanism, signal }: SquashfsOptions): Promise<DirectoryView> {
  signal.throwIfAborted();
  await using stack = new CleanupStack();
  const folder = stack.use(await ViewFolder.create(runDir));
  const target = path.join(folder.path, "files");
  await mkdir(target, { mode: 0o700 }).catch((error: unknown) => {
    throw environmentError("create", target, error);
  });
  const mount: FuseMount = { image, target, flags: MOUNT_FLAGS, folder, signal };
  const { server, fallbackReason } = await mountSomehow(mount, mechanism);
  if (server !== undefined) stack.use(server);
  signal.throwIfAborted();
  const owned = stack.move();
  const findTrouble = async (): Promise<string | undefined> => {
    if (server !== undefined && (await server.hasEnded())) return `${server.name} ${server.describeExit()}`;
    return (await mountsBelow(target)).length === 0 ? "it was unmounted" : undefined;
  };
  return { path: target, fallbackReason, findTrouble, [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose]() };
}

interface Mounted {
  readonly server: ChildProcess | undefined;
  readonly fallbackReason: string | undefined;
}

async function mountSomehow(mount: FuseMount, mechanism: SquashfsMechanism | undefined): Promise<Mounted> {
  const { image, target, flags, signal } = mount;
  const isGood = mechanism !== "kernel" && (await keepsAttributes());
  if (mechanism === "squashfuse" || (mechanism === undefined && isGood)) {
    const device = await openFuseMount(mount).catch((error: unknown) => {
      if (mechanism === "squashfuse" || !(error instanceof EnvironmentError)) throw error;
      return undefined; // a system without FUSE
    });
    // If squashfuse cannot read the image, or ends because of it, the kernel does not get the image instead.
    if (device !== undefined) {
      const server = await serveSquashfs(device, mount);
      return { server, fallbackReason: isGood ? undefined : "it was not asked" };
    }
  }
  const problem = await mountByKernel(image, target, flags, signal);
  if (problem === undefined) return { server: undefined, fallbackReason: undefined };
  const failed = `Cannot mount ${JSON.stringify(image.path)}: `;
  if (mechanism === "kernel" || isGood) throw new ChildProcessError(failed + problem);
  try {
    return { server: await serveSquashfs(await openFuseMount(mount), mount), fallbackReason: problem };
  } catch (error) {
    signal.throwIfAborted();
    if (!(error instanceof ChildProcessError || error instanceof EnvironmentError)) throw error;
    const hint = error.hint === undefined ? {} : { hint: `${error.hint} where the kernel cannot mount squashfs` };
    throw new ChildProcessError(`${error.message}; the kernel said: ${problem}`, { cause: error, ...hint });
  }
}
