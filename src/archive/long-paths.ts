// SPDX-License-Identifier: AGPL-3.0-or-later
// Paths that no archive of a container holds. A program that descends step by step, as tar does when it reads, gets
// below any depth; one that writes a tree by paths, as tar and unsquashfs do, fails at PATH_MAX, and the restore with it.
import { quote, toText } from "../core/index.ts";
import { anyOf, liveSources, planTests, runFind } from "./find.ts";
import type { ArchiveJob } from "./job.ts";
import { escapeForExcludeFile } from "./patterns.ts";

/**
 * Longest path in an archive, in bytes, with the "./" in front. Linux' PATH_MAX is 4096 with the final NUL; 255 are left
 * for what a restore puts in front: "/proc/self/fd/N/" for extended attributes (tar), the target directory (unsquashfs).
 */
const MAX_PATH_BYTES = 4096 - 1 - 255;
/** Directories whose long entries mksquashfs is told of; each costs twice the length of its path. */
const MAX_PARENTS = 1_000;

/** Matches longer paths: for tar, whose wildcards match slashes. GNU find's -path takes the same. */
export const LONG_PATH_PATTERN = `${"?".repeat(MAX_PATH_BYTES + 1)}*`;

/** Counts what is left out; a directory counts once, with everything below it. */
export class LongPaths {
  #count = 0;
  #first = "";

  /** @param path as find prints it, bytes ("latin1") */
  add(path: string): void {
    if (this.#count++ === 0) this.#first = path;
  }

  /** @returns the number of warnings given: none or one */
  report(log: ArchiveJob["log"]): 0 | 1 {
    if (this.#count === 0) return 0;
    const what = this.#count === 1 ? "1 file or directory" : `${this.#count} files and directories`;
    const first = `the ${this.#count === 1 ? "path" : "first"} begins with ${quote(toText(this.#first))}`;
    log(
      "warn",
      `left out ${what} with a path longer than ${MAX_PATH_BYTES} bytes, which no restore can create: ${first}`,
    );
    return 1;
  }
}

/** Finds what LONG_PATH_PATTERN makes tar leave out. What cannot be read is left to tar, which fails. */
export async function findLongPaths(job: ArchiveJob): Promise<LongPaths> {
  const found = new LongPaths();
  const tests = planTests(job);
  const sources = await liveSources(job, tests, "is left to the archiver");
  const expression = [...anyOf(tests), "-prune", "-o", "-path", LONG_PATH_PATTERN, "-prune", "-printf", "%p\\0"];
  for (const source of sources) {
    await runFind(job, [source, "-xdev", ...expression], "is left to the archiver", (path) => found.add(path));
  }
  return found;
}

/**
 * The same for mksquashfs, whose wildcards match one name at a time: per directory two lines of its exclude file that
 * leave out every name in it that is too long there. A container can have any number of such directories: from a bound on
 * they are left to mksquashfs, which leaves out what is longer than PATH_MAX.
 */
export class LongPathLines {
  readonly #parents = new Set<string>();

  /** @param path relative to the root, without "./", longer than the limit */
  add(path: string): readonly string[] {
    const parent = path.slice(0, path.lastIndexOf("/"));
    if (this.#parents.has(parent) || this.#parents.size >= MAX_PARENTS) return [];
    this.#parents.add(parent);
    const nameBytes = Math.max(1, MAX_PATH_BYTES + 1 - `./${parent}/`.length);
    const line = `\\${parent.split("/").map(escapeForExcludeFile).join("/")}/`;
    // A question mark does not match a leading period there.
    return [`${line}${"?".repeat(nameBytes)}*`, `${line}.${"?".repeat(nameBytes - 1)}*`];
  }
}
