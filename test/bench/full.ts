// SPDX-License-Identifier: AGPL-3.0-or-later
// A full backup without compression against the tools one would use otherwise.
import { open, rm } from "node:fs/promises";
import path from "node:path";
import { CleanupStack, MIB } from "../../src/core/index.ts";
import { type Bench, fullJob, mustEqualSource } from "./bench.ts";
import { type Contestant, compete, medianOf, seconds } from "./contest.ts";
import { runTimed, startServer } from "./processes.ts";
import { limitRow, type Row, speedRow } from "./report.ts";
import { exists } from "./source-disk.ts";

/** -t writeback and unsafe were slower; -m 4 or 8 and no -W made no difference beyond the noise. */
const CONVERT_FLAGS = ["-m", "16", "-W", "-t", "none"];
const DISK_TEST_MIB = 2048;

export async function measureFull(bench: Bench): Promise<Row[]> {
  const ours = fullJob(bench, "none");
  const convert = convertContestant(bench);
  const nbdcopy = nbdcopyContestant(bench);
  const disk = diskContestant(bench);
  for (const first of [ours, convert]) await first.run(); // a warm-up, and the proof
  await mustEqualSource(bench.source, ours.last().imagePath);
  await mustEqualSource(bench.source, imageOf(bench));
  const times = await compete([ours, convert, nbdcopy, disk], bench.runs, bench.progress);
  const loopMs = await fuseLoop(bench);
  bench.progress(`the loop on FUSE files: ${seconds(loopMs)}`);
  const [ourMs, theirMs] = [medianOf(times, ours.name), medianOf(times, convert.name)];
  const diskMs = medianOf(times, disk.name);
  const samples = Object.fromEntries(times);
  return [
    { ...speedRow(`full backup, against qemu-img ${CONVERT_FLAGS.join(" ")}`, ourMs, theirMs, 1.2), samples },
    speedRow("full backup, against nbdcopy into qemu-nbd", ourMs, medianOf(times, nbdcopy.name), 3),
    speedRow("full backup, against a 4 MiB loop on FUSE files", ourMs, loopMs, 10),
    limitRow("for scale: this disk alone, dd O_DIRECT", seconds(ourMs), seconds(diskMs), ourMs / diskMs, undefined),
  ];
}

const imageOf = (bench: Bench): string => path.join(bench.area.diskDir, "peer.qcow2");

/** qemu-img convert with `flags` into a new qcow2 file. */
export function convertContestant(bench: Bench, flags: readonly string[] = CONVERT_FLAGS): Contestant {
  const target = imageOf(bench);
  const name = `qemu-img convert ${flags.join(" ")}`;
  return {
    name,
    remove: () => rm(target, { force: true }),
    run: async () =>
      (await runTimed("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", ...flags, bench.source.uri, target])).ms,
  };
}

function nbdcopyContestant(bench: Bench): Contestant {
  const target = imageOf(bench);
  return {
    name: "nbdcopy into qemu-nbd",
    remove: () => rm(target, { force: true }),
    async run() {
      await runTimed("qemu-img", ["create", "-q", "-f", "qcow2", target, `${bench.source.sizeBytes}`]);
      return (await runTimed("nbdcopy", [bench.source.uri, "--", "[", "qemu-nbd", "-f", "qcow2", target, "]"])).ms;
    },
  };
}

/** As many bytes as the backup has, written by one process that does nothing else. */
function diskContestant(bench: Bench): Contestant {
  const target = path.join(bench.area.diskDir, "plain");
  const args = [`if=${bench.source.path}`, `of=${target}`, "bs=1M", "oflag=direct", "conv=fsync"];
  return {
    name: "dd O_DIRECT, the same number of bytes",
    remove: () => rm(target, { force: true }),
    run: async () => (await runTimed("dd", [...args, `count=${DISK_TEST_MIB}`])).ms,
  };
}

/** The loop of the upstream example: 4 MiB at a time, everything, from one FUSE file into another. */
async function fuseLoop(bench: Bench): Promise<number> {
  const from = path.join(bench.area.memoryDir, "loop-source");
  await (await open(from, "w")).close();
  await using _source = await mountFuse(bench, from, ["-r", from, bench.source.uri]);
  return await loopFrom(bench, from);
}

/** Serves a FUSE file until disposed. */
export async function mountFuse(bench: Bench, file: string, args: readonly string[]): Promise<AsyncDisposable> {
  return await startServer("nbdfuse", args, () => isMounted(file, bench.source.sizeBytes));
}

/** Copies `from` into a FUSE file on a new image, 4 MiB at a time, by dd with `flags`. Only the copy counts. */
export async function loopFrom(bench: Bench, from: string, ...flags: string[]): Promise<number> {
  const target = imageOf(bench);
  const { memoryDir } = bench.area;
  await runTimed("qemu-img", ["create", "-q", "-f", "qcow2", target, `${bench.source.sizeBytes}`]);
  await using stack = new CleanupStack();
  const socket = path.join(memoryDir, "target.sock");
  stack.use(await startServer("qemu-nbd", ["-t", "-f", "qcow2", "-k", socket, target], () => exists(socket)));
  const to = path.join(memoryDir, "loop-target");
  await (await open(to, "w")).close();
  stack.use(await mountFuse(bench, to, [to, `nbd+unix:///?socket=${encodeURIComponent(socket)}`]));
  bench.progress("the loop on FUSE files takes about half a minute");
  const { ms } = await runTimed("dd", [`if=${from}`, `of=${to}`, `bs=${4 * MIB}`, "conv=notrunc", ...flags]);
  await stack[Symbol.asyncDispose]();
  await rm(target);
  return ms;
}

async function isMounted(file: string, sizeBytes: number): Promise<boolean> {
  const handle = await open(file, "r").catch(() => undefined);
  if (handle === undefined) return false;
  try {
    return (await handle.stat()).size === sizeBytes;
  } finally {
    await handle.close();
  }
}
