// SPDX-License-Identifier: AGPL-3.0-or-later
// Refuses a job whose parts would mean something else to the tools than to us.
import { RequestError } from "../core/index.ts";
import type { ArchiveJob } from "./job.ts";

const MAX_SOURCES = 1024;
const MAX_PATTERNS = 4096;
const MAX_PATTERN_CHARS = 4096;

/** @throws RequestError naming the part that is wrong */
export function checkArchiveJob(job: ArchiveJob): void {
  if (!job.directory.startsWith("/") || job.directory.includes("\0")) {
    throw new RequestError(`Cannot archive ${JSON.stringify(job.directory)}: it is not an absolute path`);
  }
  if (job.sources.length === 0 || job.sources.length > MAX_SOURCES) {
    throw new RequestError(`Cannot archive: there are ${job.sources.length} sources, expected 1 to ${MAX_SOURCES}`);
  }
  for (const source of job.sources) {
    const parts = source.split("/");
    if (parts[0] !== "." || parts.includes("..") || source.includes("\0")) {
      throw new RequestError(`Cannot archive ${JSON.stringify(source)}: a source begins with "./" and stays below it`);
    }
  }
  if (job.excludePatterns.length > MAX_PATTERNS) {
    throw new RequestError(`Cannot archive: more than ${MAX_PATTERNS} exclude patterns`);
  }
  for (const pattern of job.excludePatterns) {
    if (pattern === "" || pattern.includes("\0") || pattern.length > MAX_PATTERN_CHARS) {
      throw new RequestError(`Cannot exclude ${JSON.stringify(pattern.slice(0, 80))}: it is not a pattern`);
    }
  }
}

/** PVE says the same of its own tar: users expect rsync's meaning. */
export function warnOfTrailingSlashes(job: ArchiveJob): void {
  for (const pattern of job.excludePatterns) {
    if (pattern.endsWith("/"))
      job.log("warn", `exclude pattern ${JSON.stringify(pattern)} matches nothing: it ends with a slash`);
  }
}
