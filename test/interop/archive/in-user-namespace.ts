// SPDX-License-Identifier: AGPL-3.0-or-later
// Runs one archive job from its arguments, for tests that start it inside a user namespace.
import { openSync, writeSync } from "node:fs";
import { writeSquashfs, writeTar } from "../../../src/archive/index.ts";
import type { ArchiveJob } from "../../../src/archive/job.ts";

const [kind, archive, json] = process.argv.slice(2);
const log: string[] = [];
const job: ArchiveJob = {
  sources: ["./"],
  excludePatterns: [],
  compression: "none",
  bandwidthLimit: 0,
  inUserNamespace: true,
  archiveFd: archive?.startsWith("fd:") ? Number(archive.slice(3)) : openSync(archive ?? "", "r+"),
  log: (level, message) => log.push(`${level} ${message}`),
  signal: new AbortController().signal,
  ...(JSON.parse(json ?? "{}") as { directory: string }),
};
try {
  const summary = await (kind === "tar" ? writeTar : writeSquashfs)(job);
  writeSync(1, JSON.stringify({ summary, log, uid: process.getuid?.() }));
} catch (error) {
  writeSync(1, JSON.stringify({ error: String(error), log }));
  process.exitCode = 1;
}
