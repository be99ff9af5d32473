// SPDX-License-Identifier: AGPL-3.0-or-later
// Where the bench works: a folder on the disk that is written to, one in memory that is read from.
import { rmSync } from "node:fs";
import { mkdir, mkdtemp, rm, statfs } from "node:fs/promises";
import { freemem } from "node:os";
import path from "node:path";
import { formatBytes, GIB } from "../../src/core/index.ts";

const MEMORY_PARENT = "/dev/shm";
/** The source disk, the sparse one, and what the programs need themselves. */
const NEEDED_MEMORY_BYTES = 5 * GIB;
/** Two images at a time, none of them compressed. */
const NEEDED_DISK_BYTES = 6 * GIB;

export class BenchError extends Error {}

export interface WorkArea extends AsyncDisposable {
  /** On the disk that the targets are written to. */
  readonly diskDir: string;
  /** On tmpfs; short, so that socket paths below it fit. */
  readonly memoryDir: string;
}

/** @throws BenchError if there is too little disk or memory */
export async function openWorkArea(parent: string): Promise<WorkArea> {
  await mkdir(parent, { recursive: true });
  await mustHave("disk", parent, NEEDED_DISK_BYTES);
  await mustHave("memory file system", MEMORY_PARENT, NEEDED_MEMORY_BYTES);
  if (freemem() < NEEDED_MEMORY_BYTES) {
    throw new BenchError(
      `Cannot measure: ${formatBytes(freemem())} of memory are free, ${formatBytes(NEEDED_MEMORY_BYTES)} are needed`,
    );
  }
  const diskDir = await mkdtemp(path.join(path.resolve(parent), "run-"));
  const memoryDir = await mkdtemp(path.join(MEMORY_PARENT, "pbh-bench-"));
  const dirs = [memoryDir, diskDir];
  const removeNow = (): void => {
    for (const dir of dirs) rmSync(dir, { recursive: true, force: true });
  };
  process.once("exit", removeNow);
  return {
    diskDir,
    memoryDir,
    async [Symbol.asyncDispose]() {
      for (const dir of dirs) await rm(dir, { recursive: true, force: true });
      process.off("exit", removeNow);
    },
  };
}

async function mustHave(what: string, dir: string, neededBytes: number): Promise<void> {
  const { bavail, bsize } = await statfs(dir);
  const free = bavail * bsize;
  if (free >= neededBytes) return;
  throw new BenchError(
    `Cannot measure: the ${what} at "${dir}" has ${formatBytes(free)} free, ${formatBytes(neededBytes)} are needed`,
  );
}
