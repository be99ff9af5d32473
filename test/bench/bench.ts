// SPDX-License-Identifier: AGPL-3.0-or-later
// What every part of the bench shares: where to work, how often, and how our side runs.
import { mkdir, rm, stat } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";
import type { Contestant } from "./contest.ts";
import type { JobOptions, JobReport } from "./job-options.ts";
import { runTimed } from "./processes.ts";
import { DEVICE, type SourceDisk } from "./source-disk.ts";
import { BenchError, type WorkArea } from "./work-area.ts";

const VMID = 100;
const GUEST_CONFIG = "name: bench\nvmgenid: 6b1f1f5e-6a0e-4f64-9d6c-0d5a3c8e7f10\n";
const FIRST_EPOCH = 1_700_000_000;

export interface Bench {
  readonly area: WorkArea;
  /** The disk of most measurements. */
  readonly source: SourceDisk;
  readonly runs: number;
  readonly progress: (line: string) => void;
}

/** A finished job of ours. */
export interface JobRun extends JobReport {
  /** The whole process: start of Node, all hooks, exit. */
  readonly ms: number;
  readonly imagePath: string;
  readonly imageBytes: number;
}

let jobs = 0;

/** Runs one job in a process of its own; the store is made if it is missing. */
export async function runJob(options: Omit<JobOptions, "epoch">): Promise<JobRun> {
  await mkdir(options.storePath, { recursive: true });
  for (const folder of ["etc/pve/priv", "run"]) await mkdir(path.join(options.root, folder), { recursive: true });
  const job: JobOptions = { ...options, epoch: FIRST_EPOCH + jobs++ };
  const program = fileURLToPath(new URL("./bench-job.mjs", import.meta.url));
  const { ms, stdout } = await runTimed(process.execPath, [program, JSON.stringify(job)]);
  const report = JSON.parse(stdout) as JobReport;
  const imagePath = path.join(options.storePath, report.archive, `${options.device}.qcow2`);
  return { ...report, ms, imagePath, imageBytes: (await stat(imagePath)).size };
}

/** Our side: a full backup of `source`. `last` is what its last run said. */
interface FullJob extends Contestant {
  readonly last: () => JobRun;
}

export function fullJob(
  bench: Bench,
  compression: JobOptions["compression"],
  source: SourceDisk = bench.source,
  more: Pick<JobOptions, "bandwidthLimit" | "fuseFile"> = {},
): FullJob {
  const storePath = path.join(bench.area.diskDir, `store-${compression}`);
  let last: JobRun | undefined;
  return {
    name: `pve-backup-host, ${compression === "none" ? "no compression" : compression}${more.fuseFile === undefined ? "" : ", file handle"}`,
    remove: () => rm(storePath, { recursive: true, force: true }),
    async run() {
      last = await runJob({
        storePath,
        root: path.join(bench.area.memoryDir, "root"),
        compression,
        mode: "full",
        vmid: VMID,
        device: DEVICE,
        sizeBytes: source.sizeBytes,
        nbdPath: source.socket,
        bitmapMode: "none",
        bitmapName: undefined,
        guestConfig: GUEST_CONFIG,
        ...more,
      });
      return last.ms;
    },
    last() {
      if (last === undefined) throw new BenchError("No job has run");
      return last;
    },
  };
}

/** A time means nothing if the image is wrong: qemu-img compares it with the source. */
export async function mustEqualSource(source: SourceDisk, imagePath: string): Promise<void> {
  await runTimed("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", source.uri, imagePath]);
}
