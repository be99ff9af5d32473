// SPDX-License-Identifier: AGPL-3.0-or-later
// What is mounted below a directory, and how to unmount it. This reads the kernel's table and never asks the mounted
// file: a stat() of a FUSE file whose server hangs would block a thread of Node.
import { execFile } from "node:child_process";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { promisify } from "node:util";
import { ChildProcessError } from "../core/index.ts";

const UNMOUNT_TIMEOUT_MS = 5_000;

const run = promisify(execFile);

interface Mount {
  readonly point: string;
  /** Type of the file system: "squashfs", "fuse", "fuse.squashfuse". */
  readonly type: string;
  /** What is mounted: "/dev/loop0", or a word that the file system chooses. */
  readonly source: string;
}

/** Mount points that are `folder` or lie below it, deepest first. */
export async function mountsBelow(folder: string): Promise<string[]> {
  const points = (await listMounts()).map(({ point }) => point);
  return points.filter((point) => point === folder || point.startsWith(`${folder}/`)).reverse();
}

/** Every mount that this process sees, in the order of mounting. */
export async function listMounts(): Promise<Mount[]> {
  return parseMounts(await readFile("/proc/self/mountinfo", "utf8"));
}

/**
 * Source: proc(5), /proc/pid/mountinfo: the mount point is field 5; type and source follow the separator after the
 * optional fields.
 */
export function parseMounts(mountinfo: string): Mount[] {
  const mounts: Mount[] = [];
  for (const line of mountinfo.split("\n")) {
    const [fields = "", kind = ""] = line.split(" - ");
    const point = fields.split(" ")[4];
    const [type = "", source = ""] = kind.split(" ");
    if (point !== undefined) mounts.push({ point: unescapeOctal(point), type, source: unescapeOctal(source) });
  }
  return mounts;
}

/**
 * Unmounts everything below `folder`; lazily where a plain unmount is refused or does not return.
 *
 * @throws ChildProcessError if a mount still exists afterwards
 */
export async function unmountBelow(folder: string): Promise<void> {
  const absolute = path.resolve(folder);
  let problem: unknown;
  for (const point of await mountsBelow(absolute)) {
    problem = await tryCommands([
      ["fusermount3", "-u", point],
      ["umount", point], // waits for a loop device to be free again
      ["umount", "-l", point],
    ]);
  }
  const left = await mountsBelow(absolute);
  if (left.length > 0) {
    throw new ChildProcessError(`Cannot unmount ${JSON.stringify(left[0])}: it is still mounted`, { cause: problem });
  }
}

/** Runs the commands until one succeeds; if none does, throws the error of the last one. */
async function tryCommands(commands: ReadonlyArray<readonly [string, ...string[]]>): Promise<unknown> {
  let problem: unknown;
  for (const [command, ...args] of commands) {
    try {
      await run(command, args, { timeout: UNMOUNT_TIMEOUT_MS, killSignal: "SIGKILL" });
      return undefined;
    } catch (error) {
      problem = error;
    }
  }
  return problem;
}

/** The kernel writes space, tab, newline and backslash as three octal digits. */
function unescapeOctal(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}
