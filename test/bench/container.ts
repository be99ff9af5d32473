// SPDX-License-Identifier: AGPL-3.0-or-later
// Container archives against the plain tools on the same tree: 100,000 files, 2 GiB.
import { closeSync, openSync } from "node:fs";
import { mkdir, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { writeSquashfs, writeTar } from "../../src/archive/index.ts";
import { inspectSquashfs, inspectTar } from "../../src/archive/inspect.ts";
import type { ArchiveCompression } from "../../src/archive/job.ts";
import { squashfsFlags } from "../../src/archive/squashfs.ts";
import { tarFlags } from "../../src/archive/tar.ts";
import { GIB, MIB } from "../../src/core/index.ts";
import { openRegularFile } from "../../src/host/index.ts";
import type { Bench } from "./bench.ts";
import { type Contestant, compete, medianOf } from "./contest.ts";
import { runTimed } from "./processes.ts";
import { type Row, speedRow } from "./report.ts";
import { BenchError } from "./work-area.ts";

const FILES = 100_000;
const FILES_PER_FOLDER = 200;
const TOTAL_BYTES = 2 * GIB;
const GOAL = 0.95;
/** The tree itself, and a folder per FILES_PER_FOLDER files. */
const MEMBERS = FILES + FILES / FILES_PER_FOLDER + 1;
const never = new AbortController().signal;

export async function measureContainer(bench: Bench): Promise<Row[]> {
  const tree = path.join(bench.area.memoryDir, "container");
  bench.progress(`making the container's tree: ${FILES} files, ${TOTAL_BYTES / GIB} GiB`);
  await makeTree(tree);
  try {
    return [
      await contest(
        bench,
        "tar, against GNU tar with the same flags",
        ours(bench, tree, "tar", "none"),
        plainTar(bench, tree, []),
      ),
      await contest(
        bench,
        "tar with zstd, against tar -I 'zstd -T0'",
        ours(bench, tree, "tar", "zstd"),
        plainTar(bench, tree, ["-I", "zstd -T0"]),
      ),
      await contest(
        bench,
        "squashfs, against mksquashfs",
        ours(bench, tree, "squashfs", "zstd"),
        plainSquashfs(bench, tree),
      ),
    ];
  } finally {
    await rm(tree, { recursive: true, force: true });
  }
}

async function contest(bench: Bench, measure: string, our: Contestant, their: Contestant): Promise<Row> {
  const times = await compete([our, their], bench.runs, bench.progress);
  const row = speedRow(measure, medianOf(times, our.name), medianOf(times, their.name), GOAL);
  return { ...row, samples: Object.fromEntries(times) };
}

/** Sizes from nothing to four times the mean, about half of the bytes compressible; the same in each run. */
async function makeTree(tree: string): Promise<void> {
  const data = Buffer.alloc(8 * MIB);
  let state = 0x2545f491;
  for (let at = 0; at < data.byteLength; at += 4) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    data.writeInt32LE((at >> 12) % 2 === 0 ? state : at & 0xff, at);
  }
  const meanBytes = TOTAL_BYTES / FILES;
  for (let file = 0; file < FILES; file++) {
    const folder = path.join(tree, `folder-${String(Math.floor(file / FILES_PER_FOLDER))}`);
    if (file % FILES_PER_FOLDER === 0) await mkdir(folder, { recursive: true });
    const bytes = Math.floor(meanBytes * 4 * ((file * 0.618034) % 1) ** 3);
    const from = (file * 4099) % (data.byteLength - bytes);
    await writeFile(path.join(folder, `file-${file}`), data.subarray(from, from + bytes));
  }
}

function ours(bench: Bench, directory: string, kind: "tar" | "squashfs", compression: ArchiveCompression): Contestant {
  const archive = path.join(bench.area.diskDir, `ours.${kind}`);
  let isChecked = false;
  return {
    name: `pve-backup-host, ${kind}, ${compression}`,
    remove: () => rm(archive, { force: true }),
    async run() {
      const startMs = performance.now();
      const archiveFd = openSync(archive, "wx+", 0o600);
      const job = { directory, sources: ["./"], excludePatterns: [], compression, bandwidthLimit: 0, archiveFd };
      const log = (): void => undefined;
      const write = kind === "tar" ? writeTar : writeSquashfs;
      await write({ ...job, inUserNamespace: false, log, signal: never });
      closeSync(archiveFd);
      const ms = performance.now() - startMs;
      // A time means nothing if files are missing.
      if (!isChecked) {
        await using file = await openRegularFile(archive);
        const { members } = await (kind === "tar" ? inspectTar : inspectSquashfs)(file, never);
        if (members !== MEMBERS) throw new BenchError(`${archive} has ${members} members, ${MEMBERS} are wanted`);
      }
      isChecked = true;
      return ms;
    },
  };
}

function plainTar(bench: Bench, directory: string, flags: readonly string[]): Contestant {
  const archive = path.join(bench.area.diskDir, "plain.tar");
  const args = tarFlags({ directory, sources: ["./"], excludePatterns: [] }).filter((flag) => flag !== "--file=-");
  return {
    name: `tar ${flags.join(" ")}`.trim(),
    remove: () => rm(archive, { force: true }),
    run: async () => (await runTimed("tar", [...flags, `--file=${archive}`, ...args])).ms,
  };
}

function plainSquashfs(bench: Bench, directory: string): Contestant {
  const archive = path.join(bench.area.diskDir, "plain.sqfs");
  const flags = squashfsFlags("zstd").filter((flag, index, all) => flag !== "-mem" && all[index - 1] !== "-mem");
  return {
    name: "mksquashfs",
    remove: () => rm(archive, { force: true }),
    run: async () => (await runTimed("mksquashfs", [directory, archive, ...flags])).ms,
  };
}
