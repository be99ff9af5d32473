// SPDX-License-Identifier: AGPL-3.0-or-later
// The content of a squashfs image as a read-only folder: the kernel's own file system, or squashfuse where
// the kernel has none or may not mount (in a container of its own).
import { execFile } from "node:child_process";
import { mkdir } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { ChildProcessError, CleanupStack, environmentError, messageOf, oneLine, RequestError } from "../core/index.ts";
import { mountsBelow } from "./mounts.ts";
import { ToolProcess } from "./tool-process.ts";
import { ViewFolder } from "./view-folder.ts";
import { waitUntilServed } from "./wait-until-served.ts";

const MOUNT_TIMEOUT_MS = 30_000;
const KILL_TIMEOUT_MS = 5_000;
const MOUNT_FLAGS = "ro,nosuid,nodev";

const run = promisify(execFile);

export type SquashfsMechanism = "kernel" | "squashfuse";

/** A folder that exists until it is disposed. */
export interface DirectoryView extends AsyncDisposable {
  readonly path: string;
  /** Why squashfuse serves it, and not the kernel; undefined if the kernel does. */
  readonly fallbackReason: string | undefined;
  /**
   * What has become of the mount, if it serves no longer. A reader need not have noticed: without the mount there is an
   * empty folder, of which tar makes an empty archive and succeeds.
   */
  findTrouble(): Promise<string | undefined>;
}

export interface SquashfsOptions {
  /** Absolute path of the image. */
  readonly image: string;
  /** Folder for mounts, on a local file system; made if missing. */
  readonly runDir: string;
  /** Default: the kernel, then squashfuse. */
  readonly mechanism?: SquashfsMechanism;
  readonly signal: AbortSignal;
}

/**
 * Mounts an image read-only, without setuid and devices, at a place of its own. Owners are those in the image.
 *
 * @throws ChildProcessError if neither way works; EnvironmentError if `runDir` cannot be written; RequestError;
 *   the abort reason of `signal`
 */
export async function mountSquashfs(options: SquashfsOptions): Promise<DirectoryView> {
  const { image, mechanism, signal } = options;
  signal.throwIfAborted();
  if (!path.isAbsolute(image) || image.includes("\0")) {
    throw new RequestError(`Cannot mount ${JSON.stringify(image)}: an absolute path is wanted`);
  }
  await using stack = new CleanupStack();
  const folder = stack.use(await ViewFolder.create(options.runDir));
  const target = path.join(folder.path, "files");
  await mkdir(target, { mode: 0o700 }).catch((error: unknown) => {
    throw environmentError("create", target, error);
  });
  let server: ToolProcess | undefined;
  const problem = mechanism === "squashfuse" ? undefined : await mountByKernel(image, target, signal);
  if (mechanism === "squashfuse" || (problem !== undefined && mechanism === undefined)) {
    server = await mountByFuse({ image, target, folder, stack, signal, before: problem });
  } else if (problem !== undefined) {
    throw new ChildProcessError(`Cannot mount ${JSON.stringify(image)}: ${problem}`);
  }
  signal.throwIfAborted();
  const owned = stack.move();
  const findTrouble = async (): Promise<string | undefined> => {
    if (server !== undefined && (await server.hasEnded())) return `${server.name} ${server.describeExit()}`;
    return (await mountsBelow(target)).length === 0 ? "it was unmounted" : undefined;
  };
  const fallbackReason = server === undefined ? undefined : (problem ?? "it was not asked");
  return { path: target, fallbackReason, findTrouble, [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose]() };
}

/** @returns what went wrong; undefined if it is mounted */
async function mountByKernel(image: string, target: string, signal: AbortSignal): Promise<string | undefined> {
  const options = { timeout: MOUNT_TIMEOUT_MS, killSignal: "SIGKILL", signal, env: toolEnv() } as const;
  const mounting = run("mount", ["-t", "squashfs", "-o", `loop,${MOUNT_FLAGS}`, "--", image, target], options);
  const ended = new Promise((resolve) => mounting.child.once("close", resolve));
  try {
    await mounting;
    return undefined;
  } catch (error) {
    // A cancelled one may still be in the kernel: what it mounts must not come after the clean-up.
    await Promise.race([ended, sleep(KILL_TIMEOUT_MS, undefined, { ref: false })]);
    signal.throwIfAborted();
    const said = oneLine(String((error as { stderr?: string }).stderr ?? ""));
    return said === "" ? messageOf(error) : said;
  }
}

interface FuseMount {
  readonly image: string;
  readonly target: string;
  readonly folder: ViewFolder;
  readonly stack: CleanupStack;
  readonly signal: AbortSignal;
  /** Why the kernel did not do it. */
  readonly before: string | undefined;
}

async function mountByFuse({ image, target, folder, stack, signal, before }: FuseMount): Promise<ToolProcess> {
  // squashfuse itself gives each name an inode of its own: a file with several names would be restored several times.
  const server = stack.use(
    await ToolProcess.start("squashfuse_ll", ["-f", "-o", MOUNT_FLAGS, image, target], folder.path),
  );
  await folder.addChild(server);
  const act = `Cannot mount ${JSON.stringify(image)}`;
  try {
    const wait = { act, servers: [server], timeoutMs: MOUNT_TIMEOUT_MS, signal };
    await waitUntilServed(wait, async () => (await mountsBelow(target)).length > 0);
  } catch (error) {
    if (!(error instanceof ChildProcessError)) throw error;
    const kernel = before === undefined ? "" : `; the kernel said: ${before}`;
    const hint = "install the package squashfuse where the kernel cannot mount squashfs";
    throw new ChildProcessError(error.message + kernel, { cause: error, ...(server.hasExited ? { hint } : {}) });
  }
  return server;
}

function toolEnv(): NodeJS.ProcessEnv {
  return { ...process.env, LC_ALL: "C" };
}
