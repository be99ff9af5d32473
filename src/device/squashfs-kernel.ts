// SPDX-License-Identifier: AGPL-3.0-or-later
// A squashfs image mounted by the kernel, through a loop device over the very file that was opened.
import { execFile } from "node:child_process";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { EnvironmentError, messageOf, oneLine } from "../core/index.ts";
import type { RegularFile } from "../host/index.ts";
import { openLoopDevice } from "./loop-device.ts";

const MOUNT_TIMEOUT_MS = 30_000;
const KILL_TIMEOUT_MS = 5_000;

const run = promisify(execFile);

/**
 * Mounts `image`, which is borrowed, on `target`. Whatever is mounted there afterwards, even after an error, is the
 * caller's to unmount.
 *
 * @returns what went wrong; undefined if it is mounted
 * @throws the abort reason of `signal`
 */
export async function mountByKernel(
  image: RegularFile,
  target: string,
  flags: string,
  signal: AbortSignal,
): Promise<string | undefined> {
  try {
    await using device = await openLoopDevice(image);
    return await mountDevice(device.path, target, flags, signal);
  } catch (error) {
    if (error instanceof EnvironmentError) return error.message;
    throw error;
  }
}

async function mountDevice(
  device: string,
  target: string,
  flags: string,
  signal: AbortSignal,
): Promise<string | undefined> {
  const env = { ...process.env, LC_ALL: "C" };
  const options = { timeout: MOUNT_TIMEOUT_MS, killSignal: "SIGKILL", signal, env } as const;
  const mounting = run("mount", ["-t", "squashfs", "-o", flags, "--", device, target], options);
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
