// SPDX-License-Identifier: AGPL-3.0-or-later
// A squashfs image mounted by the kernel, through a loop device.
import { execFile } from "node:child_process";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { ChildProcessError, messageOf, oneLine } from "../core/index.ts";
import type { RegularFile } from "../host/index.ts";
import { listMounts } from "./mounts.ts";

const MOUNT_TIMEOUT_MS = 30_000;
const ASK_TIMEOUT_MS = 10_000;
const KILL_TIMEOUT_MS = 5_000;

const run = promisify(execFile);
const env = (): NodeJS.ProcessEnv => ({ ...process.env, LC_ALL: "C" });

/**
 * Mounts `image` on `target`. What is mounted then is the caller's to unmount, also after an error.
 *
 * @returns what went wrong; undefined if it is mounted
 * @throws ChildProcessError if another file was mounted; the abort reason of `signal`
 */
export async function mountByKernel(
  image: RegularFile,
  target: string,
  flags: string,
  signal: AbortSignal,
): Promise<string | undefined> {
  const options = { timeout: MOUNT_TIMEOUT_MS, killSignal: "SIGKILL", signal, env: env() } as const;
  const mounting = run("mount", ["-t", "squashfs", "-o", `loop,${flags}`, "--", image.path, target], options);
  const ended = new Promise((resolve) => mounting.child.once("close", resolve));
  try {
    await mounting;
  } catch (error) {
    // A cancelled one may still be in the kernel: what it mounts must not come after the clean-up.
    await Promise.race([ended, sleep(KILL_TIMEOUT_MS, undefined, { ref: false })]);
    signal.throwIfAborted();
    const said = oneLine(String((error as { stderr?: string }).stderr ?? ""));
    return said === "" ? messageOf(error) : said;
  }
  await assertIsMounted(image, target, signal);
  return undefined;
}

/**
 * mount(8) takes no descriptor: of /proc/self/fd/N it makes a path again. So the file may be another one by then.
 * The loop device knows which one it holds.
 */
async function assertIsMounted(image: RegularFile, target: string, signal: AbortSignal): Promise<void> {
  const act = `Cannot mount ${JSON.stringify(image.path)}`;
  const { dev, ino } = await image.handle.stat({ bigint: true });
  const wanted = `${ino} on ${formatDevice(dev)}`;
  const device = (await listMounts()).filter(({ point }) => point === target).at(-1)?.source ?? "";
  let found: string;
  try {
    // No JSON: there an inode is a number, of which the 64 bits of some shares do not fit JavaScript's.
    const columns = ["--noheadings", "--output", "BACK-INO,BACK-MAJ:MIN"];
    const { stdout } = await run("losetup", ["--list", ...columns, device], {
      timeout: ASK_TIMEOUT_MS,
      signal,
      env: env(),
    });
    found = stdout.trim().split(/\s+/).join(" on ");
  } catch (cause) {
    signal.throwIfAborted();
    throw new ChildProcessError(`${act}: the file behind ${JSON.stringify(device)} is unknown`, { cause });
  }
  if (found !== wanted) throw new ChildProcessError(`${act}: it is not the file that was checked`);
}

/** "major:minor". Source: glibc, sysdeps/unix/sysv/linux/bits/sysmacros.h, gnu_dev_major() and gnu_dev_minor(). */
export function formatDevice(dev: bigint): string {
  const major = ((dev >> 8n) & 0xfffn) | ((dev >> 32n) & 0xfffff000n);
  const minor = (dev & 0xffn) | ((dev >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}
