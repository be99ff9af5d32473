// SPDX-License-Identifier: AGPL-3.0-or-later
// A squashfs image served by squashfuse_ll with few rights: we mount, and it gets the open device and the open image. A
// security hole in it is not one in the kernel, and does not make an attacker root.
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { type FileHandle, open, stat } from "node:fs/promises";
import { ChildProcessError, CleanupStack, EnvironmentError, environmentError, oneLine } from "../core/index.ts";
import { ChildProcess, openAgain, type RegularFile, reopenerFlags } from "../host/index.ts";
import type { ViewFolder } from "./view-folder.ts";
import { waitUntilServed } from "./wait-until-served.ts";

/** squashfuse itself gives each name its own inode, so a file with several names would be restored several times. */
const SERVER = "squashfuse_ll";
const MOUNT_TIMEOUT_MS = 30_000;
const ASK_TIMEOUT_MS = 10_000;
/** As libfuse would mount it. */
const TYPE = `fuse.${SERVER}`;

export interface FuseMount {
  readonly image: RegularFile;
  readonly target: string;
  readonly flags: string;
  readonly folder: ViewFolder;
  readonly signal: AbortSignal;
}

/** The kernel's end of a mount that is not served yet: once this is closed, the mount has no server. */
type FuseDevice = FileHandle;

/**
 * Mounts on `target` what a server will serve through the device. The caller must undo the mount.
 *
 * @throws EnvironmentError if this system has no FUSE, or does not let us use it; the abort reason of `signal`
 */
export async function openFuseMount({ target, flags, signal }: Omit<FuseMount, "image">): Promise<FuseDevice> {
  await using stack = new CleanupStack();
  const device = stack.use(
    await open("/dev/fuse", "r+").catch((error: unknown) => {
      throw environmentError("open", "/dev/fuse", error);
    }),
  );
  // Without allow_other: only our user can use the files, whatever their modes are.
  const ids = `user_id=${process.getuid?.() ?? 0},group_id=${process.getgid?.() ?? 0}`;
  const args = ["-i", "-t", TYPE, "-o", `${flags},fd=3,rootmode=40000,${ids}`, "--", SERVER, target];
  const child = spawn("mount", args, {
    stdio: ["ignore", "ignore", "pipe", device.fd],
    env: { ...process.env, LC_ALL: "C" },
    timeout: ASK_TIMEOUT_MS,
    killSignal: "SIGKILL",
  });
  let said = "";
  child.stderr?.setEncoding("utf8").on("data", (text: string) => {
    said = (said + text).slice(0, 4096);
  });
  const [status] = (await once(child, "close").catch((error: unknown) => {
    throw environmentError("start", "mount", error);
  })) as [number | null];
  signal.throwIfAborted();
  if (status !== 0) {
    throw new EnvironmentError(`Cannot mount by FUSE on ${JSON.stringify(target)}: ${oneLine(said) || "mount failed"}`);
  }
  stack.move();
  return device;
}

/**
 * Starts the server and waits for its first answer. From then on only the server holds `device`: if we held it, too, a
 * reader would wait for a server that has ended.
 *
 * @throws ChildProcessError if it ends or does not answer; the abort reason of `signal`
 */
export async function serveSquashfs(
  device: FuseDevice,
  { image, target, folder, signal }: FuseMount,
): Promise<ChildProcess> {
  await using stack = new CleanupStack();
  const start = async (): Promise<ChildProcess> => {
    await using _device = device;
    await using file = await openAgain(image);
    const setprivFlags = await reopenerFlags(file);
    const args = ["-f", "/proc/self/fd/3", "/dev/fd/4"];
    // On SIGTERM, some builds unmount by the name of their mount point, which is a number here.
    const stdio = ["ignore", "ignore", file.fd, device.fd] as const;
    return await ChildProcess.start(SERVER, args, { cwd: folder.path, stdio, setprivFlags, endBy: "KILL" });
  };
  const server = stack.use(await start());
  await folder.addChild(server);
  const act = `Cannot mount ${JSON.stringify(image.path)}`;
  try {
    const wait = { act, servers: [server], timeoutMs: MOUNT_TIMEOUT_MS, signal };
    // This call waits for the server's first answer. If it fails because the server ended, that is the real error.
    await waitUntilServed(wait, () => stat(target).catch(() => undefined));
  } catch (error) {
    if (!(error instanceof ChildProcessError) || !server.hasExited) throw error;
    throw new ChildProcessError(error.message, { cause: error, hint: "install the package squashfuse" });
  }
  server.forgetOutput();
  stack.move();
  return server;
}

/**
 * Whether the installed squashfuse gives extended attributes their right names. Before 0.2.0 those of security.*, file
 * capabilities among them, were called trusted.*, and vice versa; Debian 12 has 0.1.105, which prints 0.1.104.
 * Source: squashfuse, NEWS of 0.2.0.
 */
export async function keepsAttributes(): Promise<boolean> {
  const version = await new Promise<string>((resolve) => {
    // It also prints its usage and ends with a failure.
    execFile(SERVER, ["-V"], { timeout: ASK_TIMEOUT_MS }, (_error, stdout, stderr) => resolve(stdout + stderr));
  });
  const [, major = "0", minor = "0"] = /^squashfuse (\d+)\.(\d+)/m.exec(version) ?? [];
  return Number(major) > 0 || Number(minor) >= 2;
}
