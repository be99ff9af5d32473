// SPDX-License-Identifier: AGPL-3.0-or-later
// One backup job in a process of its own: PVE's hooks in PVE's order, then a line of JSON about it.
// Usage: node dist/bench-job.mjs '{"storePath": ...}'
import { constants } from "node:fs";
import { open } from "node:fs/promises";
import { CleanupStack } from "../../src/core/index.ts";
import { DirectoryProvider } from "../../src/directory/directory-provider.ts";
import { NbdConnection } from "../../src/nbd/index.ts";
import type { FileHandleCalls, VmVolume } from "../../src/provider/index.ts";
import type { JobOptions, JobReport } from "./job-options.ts";

const never = new AbortController().signal;

/** Notes when the first read of any connection has ended: the product itself has no such hook. */
function watchFirstRead(): { readonly atMs: () => number | undefined } {
  let atMs: number | undefined;
  const read = NbdConnection.prototype.read;
  NbdConnection.prototype.read = async function (this: NbdConnection, ...args) {
    await read.apply(this, args);
    if (atMs === undefined) {
      atMs = performance.now();
      NbdConnection.prototype.read = read;
    }
  };
  return { atMs: () => atMs };
}

/** The Perl side's answers: the whole disk is dirty, and what is given up stays. */
function fileHandleCalls(sizeBytes: number): FileHandleCalls {
  return {
    nextDirtyRegions: async () => ({ regions: [{ offset: 0, length: sizeBytes }], done: true }),
    deallocate: async () => undefined,
  };
}

/** The volume as `backup_vm` gets it. This process also plays the one that holds the file open. */
async function volumeOf(options: JobOptions, stack: CleanupStack): Promise<VmVolume> {
  const { bitmapMode, bitmapName, fuseFile, nbdPath, sizeBytes: size } = options;
  if (fuseFile === undefined) return { size, bitmapMode, bitmapName, nbdPath };
  const handle = await open(fuseFile, constants.O_RDONLY | constants.O_DIRECT);
  stack.defer(() => handle.close());
  const fileHandle = { pid: process.pid, fd: handle.fd };
  return { size, bitmapMode, bitmapName: undefined, nbdPath: undefined, fileHandle };
}

async function runJob(options: JobOptions): Promise<JobReport> {
  const log: string[] = [];
  const { device, epoch, sizeBytes, vmid } = options;
  const scfg = {
    path: options.storePath,
    "vm-backup-mode": options.mode,
    "dir-compression": options.compression,
  };
  await using provider = new DirectoryProvider(
    {
      ...{ storeid: "bench", scfg, nodename: "bench" },
      log: (_level, message) => void log.push(message),
      fileHandles: fileHandleCalls(sizeBytes),
    },
    { root: options.root },
  );
  await provider.backup.jobInit();
  const { archiveName } = await provider.backup.backupInit(vmid, "qemu", epoch, never);
  const answers = await provider.backup.backupVmQueryIncremental(vmid, new Map([[device, { size: sizeBytes }]]), never);
  if (options.bitmapMode === "reuse" && answers.get(device) !== "use") {
    throw new Error(`The provider does not want to reuse the bitmap of ${device}: ${log.join("\n")}`);
  }
  await using stack = new CleanupStack();
  const volumes = new Map([[device, await volumeOf(options, stack)]]);
  const firstRead = watchFirstRead();
  const startMs = performance.now();
  const info = { bandwidthLimit: options.bandwidthLimit ?? 0, firewallConfig: undefined };
  await provider.backup.backupVm(vmid, Buffer.from(options.guestConfig), volumes, info, never);
  const backupMs = performance.now() - startMs;
  await provider.backup.backupCleanup(vmid, "qemu", true, undefined, never);
  await provider.backup.jobCleanup(never);
  const firstMs = firstRead.atMs();
  return {
    archive: archiveName,
    peakBytes: process.resourceUsage().maxRSS * 1024,
    firstByteMs: firstMs === undefined ? undefined : firstMs - startMs,
    backupMs,
    log,
  };
}

const report = await runJob(JSON.parse(process.argv[2] ?? "") as JobOptions);
process.stdout.write(`${JSON.stringify(report)}\n`);
