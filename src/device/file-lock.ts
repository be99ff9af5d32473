// SPDX-License-Identifier: AGPL-3.0-or-later
// An exclusive flock(2), which is what Perl's flock takes; Node has no call for it.
import { open } from "node:fs/promises";
import { constants } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { EnvironmentError, environmentError } from "../core/index.ts";
import { loadKoffi, loadNativeLibrary } from "../host/index.ts";
import { makePublicFile } from "./public-files.ts";

const LOCK_EX = 2;
const LOCK_NB = 4;
const POLL_MS = 20;
const { EAGAIN, EINTR } = constants.errno;

/**
 * Locks `file`, which is created if missing and never removed, because a process that waits for the lock holds its
 * inode. Closing releases the lock, and so does the end of this process.
 *
 * @throws EnvironmentError if another process holds the lock for `timeoutMs`, or locks are not available; the abort
 *   reason
 */
export async function lockFile(file: string, timeoutMs: number, signal: AbortSignal): Promise<AsyncDisposable> {
  signal.throwIfAborted();
  loaded ??= loadFlock(file);
  const flock = loaded;
  const deadline = performance.now() + timeoutMs;
  const handle = await openLockFile(file);
  try {
    for (;;) {
      const number = flock(handle.fd);
      if (number === 0) return handle;
      if (number !== EAGAIN && number !== EINTR) {
        const errno = nameOf(number);
        throw new EnvironmentError(`Cannot lock ${JSON.stringify(file)}: the system refuses (${errno})`, { errno });
      }
      signal.throwIfAborted();
      if (performance.now() > deadline) {
        const seconds = timeoutMs / 1000;
        throw new EnvironmentError(`Cannot lock ${JSON.stringify(file)}: another program has held it for ${seconds} s`);
      }
      await sleep(POLL_MS);
    }
  } catch (error) {
    await handle.close();
    throw error;
  }
}

async function openLockFile(file: string) {
  try {
    await makePublicFile(file);
    return await open(file, "a");
  } catch (error) {
    throw environmentError("open the lock file", file, error);
  }
}

function nameOf(number: number): string {
  return Object.entries(constants.errno).find(([, value]) => value === number)?.[0] ?? `errno ${number}`;
}

/** Tries once. @returns the errno, 0 if it is locked */
type Flock = (fd: number) => number;

let loaded: Flock | undefined;

function loadFlock(file: string): Flock {
  const koffi = loadKoffi();
  const flock = loadNativeLibrary("libc.so.6")?.func("flock", "int", ["int", "int"]);
  if (koffi === undefined || flock === undefined) {
    throw new EnvironmentError(`Cannot lock ${JSON.stringify(file)}: the addon koffi does not load`);
  }
  return (fd) => (flock(fd, LOCK_EX | LOCK_NB) === 0 ? 0 : koffi.errno());
}
