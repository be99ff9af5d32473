// SPDX-License-Identifier: AGPL-3.0-or-later
// The program behind a tar, all cores: zstd has threads itself, for gzip's format that is pigz.
import { access, constants } from "node:fs/promises";
import { join } from "node:path";
import type { ArchiveCompression, ArchiveJob } from "./job.ts";

export interface Compressor {
  readonly command: string;
  readonly args: readonly string[];
}

const PROGRAMS: Readonly<Record<"zstd" | "pigz" | "gzip", Compressor>> = {
  zstd: { command: "zstd", args: ["-q", "-T0", "-c"] },
  pigz: { command: "pigz", args: ["-c"] },
  gzip: { command: "gzip", args: ["-c"] },
};

/** @returns undefined for an archive without compression */
export async function findCompressor(
  compression: ArchiveCompression,
  log: ArchiveJob["log"],
): Promise<Compressor | undefined> {
  if (compression === "none") return undefined;
  if (compression === "zstd") return PROGRAMS.zstd;
  if (await isInPath("pigz")) return PROGRAMS.pigz;
  log("info", "compressing on one core: install pigz to use all of them");
  return PROGRAMS.gzip;
}

async function isInPath(command: string): Promise<boolean> {
  for (const folder of (process.env.PATH ?? "/usr/bin:/bin").split(":")) {
    const found = await access(join(folder, command), constants.X_OK).then(
      () => true,
      () => false,
    );
    if (found) return true;
  }
  return false;
}
