// SPDX-License-Identifier: AGPL-3.0-or-later
// What the tests of failing operations share: a directory in memory, and the search for what a job left behind.
import { mkdtemp, readdir, readFile, rename, rm, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { runTool } from "../../../fixtures/lab/index.ts";

const HOURS_AGO_MS = 3 * 60 * 60 * 1000;

/** A directory in memory: otherwise hundreds of jobs with dozens of fsync() each would wait for the disk. */
export class MemoryFolder implements AsyncDisposable {
  readonly #folder: string;

  private constructor(folder: string) {
    this.#folder = folder;
  }

  static async mount(): Promise<MemoryFolder> {
    const folder = await mkdtemp(path.join(tmpdir(), "pbh-fault-"));
    await runTool("mount", ["-t", "tmpfs", "-o", "size=512m", "tmpfs", folder]);
    return new MemoryFolder(folder);
  }

  /** Runs `work` with this as the directory for temporary files. */
  async use<T>(work: () => Promise<T>): Promise<T> {
    const before = process.env.TMPDIR;
    process.env.TMPDIR = this.#folder;
    try {
      return await work();
    } finally {
      if (before === undefined) delete process.env.TMPDIR;
      else process.env.TMPDIR = before;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await runTool("umount", ["--lazy", this.#folder]);
    await rm(this.#folder, { recursive: true, force: true });
  }
}

const IS_LEFT = /(^|\/)\.(tmp|staging|trash)-[^/]*$|\.lock$|\.locks\/.|run\/pve-backup-host\/./;

/** Paths of what should not exist between two jobs. */
export async function leftBelow(folders: readonly string[]): Promise<string[]> {
  const found: string[] = [];
  for (const folder of folders) {
    const names = await readdir(folder, { recursive: true }).catch((): string[] => []);
    found.push(...names.map((name) => path.join(folder, name)));
  }
  return found.filter((file) => IS_LEFT.test(file));
}

/**
 * Temporary files are swept by age alone, because some are created without the guest's lock: this makes them old
 * enough.
 */
export async function age(files: readonly string[]): Promise<void> {
  const then = new Date(Date.now() - HOURS_AGO_MS);
  for (const file of files.filter((one) => one.includes("/.tmp-"))) await utimes(file, then, then);
}

/**
 * The bridge's process ends with its job; the process of a test does not, so its directories get an owner that has
 * ended.
 */
export async function endOwners(runDir: string): Promise<void> {
  for (const name of await readdir(runDir).catch((): string[] => [])) {
    const folder = path.join(runDir, name);
    const record = path.join(folder, "owner.json");
    const owner = await readFile(record, "utf8").catch(() => undefined);
    if (owner !== undefined) await writeFile(record, owner.replaceAll(/"startTime":"\d+"/g, '"startTime":"1"'));
    // No process has the highest possible pid.
    else await rename(folder, path.join(runDir, name.replace(/-\d+-/, "-4194304-")));
  }
}
