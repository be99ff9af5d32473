// SPDX-License-Identifier: AGPL-3.0-or-later
// What the tests of single rules share: one small guest, backups that must succeed, and the check of a point against
// copies of the disks taken at its time.
import { readdir } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import {
  type BackupOptions,
  compareRaw,
  type LabBackup,
  LabGuest,
  type LabGuestOptions,
  seededBytes,
  until,
} from "../../../fixtures/lab/index.ts";
import type { HostError } from "../../../src/core/index.ts";
import type { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import type { TestNode } from "../node/test-node.ts";
import { backUp, type JobOptions, type JobResult, restore } from "./vm-job.ts";

export const MIB = 2 ** 20;
export const VMID = 100;
export const DISK = "drive-scsi0";
export const DISK_BYTES = 24 * MIB;
export const never = new AbortController().signal;
/** The error of a job when the guest's QEMU dies during its backup. */
export const QEMU_ENDED =
  /^Cannot back up "drive-scsi0": the QEMU process of VM 100 ended its NBD server during the backup \(E[A-Z]+\)$/;

/** A running VM 100 with some data on its disk. */
export async function startGuest(node: TestNode, options: Partial<LabGuestOptions> = {}): Promise<LabGuest> {
  const guest = await LabGuest.start({
    dir: `${node.dir}/vm`,
    root: node.root,
    vmid: VMID,
    storeid: node.storeid,
    disks: [{ device: DISK, sizeBytes: DISK_BYTES }],
    ...options,
  });
  await guest.write(DISK, 0, seededBytes("start", 5 * MIB));
  return guest;
}

export interface SafeBackup {
  readonly volname: string;
  readonly oracles: ReadonlyMap<string, string>;
  readonly job: JobResult;
}

/** A job that must succeed; keeps copies of the disks. */
export async function mustBackUp(node: TestNode, guest: LabGuest, options: JobOptions): Promise<SafeBackup> {
  const job = await backUp(node, guest, { oracleDir: `${node.dir}/oracle-${options.epoch}`, ...options });
  expect(job.error, job.log.join("\n")).toBeUndefined();
  return { volname: job.volname ?? "nothing", oracles: job.oracles, job };
}

/** Restores every point and compares each disk bit for bit. */
export async function expectRestores(node: TestNode, ...points: ReadonlyArray<Omit<SafeBackup, "job">>): Promise<void> {
  for (const { volname, oracles } of points) {
    const restored = await restore(node, volname, async (device, rawPath) => {
      expect(await compareRaw(rawPath, oracles.get(device) ?? "no such oracle"), `${volname} ${device}`).toMatchObject({
        identical: true,
      });
    });
    expect(new Set(restored.devices)).toEqual(new Set(oracles.keys()));
  }
}

/**
 * As the job's log says it about one device: "incremental since <volname>", or "full: <reason>" where everything was
 * read, whether all of it was stored or only what differs from the base.
 */
export function modeOf(job: Pick<JobResult, "log">, device = DISK): string {
  for (const line of job.log) {
    const full = line.match(new RegExp(`^info: ${device}: full backup of [^(]* \\((.*)\\)$`));
    if (full !== null) return `full: ${full[1]}`;
    const all = line.match(
      new RegExp(`^info: ${device}: incremental backup since "[^"]*", all of .* is read \\((.*)\\)$`),
    );
    if (all !== null) return `full: ${all[1]}`;
    const base = line.match(new RegExp(`^info: ${device}: incremental backup \\(.* changed since "(.*)"\\)$`));
    if (base !== null) return `incremental since ${base[1]}`;
  }
  return `nothing said of ${device}`;
}

/** The calls of a job up to the open backup access; the caller continues from there. */
export async function openJob(
  provider: DirectoryProvider,
  guest: LabGuest,
  options: { readonly epoch: number } & Pick<BackupOptions, "oracleDir" | "fleecingBytes" | "storeid">,
): Promise<{ archiveName: string; access: LabBackup }> {
  const { epoch, ...access } = options;
  await provider.backup.jobInit();
  const { archiveName } = await provider.backup.backupInit(guest.vmid, "qemu", epoch, never);
  const modes = await provider.backup.backupVmQueryIncremental(guest.vmid, guest.devices, never);
  return { archiveName, access: await guest.openBackup({ modes, ...access }) };
}

/** backup_vm on an open access. */
export async function copyDisks(
  provider: DirectoryProvider,
  guest: LabGuest,
  access: LabBackup,
  bandwidthLimit = 0,
  signal: AbortSignal = never,
): Promise<void> {
  const info = { bandwidthLimit, firewallConfig: undefined };
  await provider.backup.backupVm(guest.vmid, Buffer.from(guest.guestConfig), access.vmVolumes(), info, signal);
}

/** The error with which `promise` was rejected, as one of our errors; fails if it was not rejected with one. */
export async function refusalOf(promise: Promise<unknown>): Promise<Pick<HostError, "code" | "message">> {
  const error = await promise.then(
    (value) => new Error(`not refused but answered ${JSON.stringify(value)}`),
    (thrown: unknown) => thrown,
  );
  const { code, message } = error as HostError;
  return { code, message };
}

/**
 * What exists in the guest's directory while a job works, and must not exist afterwards: staging directory and lock.
 */
export async function leftovers(node: TestNode): Promise<string[]> {
  const names = await readdir(path.join(node.storePath, String(VMID)));
  return names.filter((name) => name.startsWith(".staging-") || name === ".lock");
}

/** Waits until `file` of the backup is being written: its source is connected then, and the copy has begun. */
export async function untilCopying(node: TestNode, vmid = VMID, file = `${DISK}.qcow2`): Promise<void> {
  const folder = path.join(node.storePath, String(vmid));
  await until(`${file} is being written`, async () => {
    const staging = (await readdir(folder)).find((name) => name.startsWith(".staging-")) ?? "none";
    return (await readdir(path.join(folder, staging)).catch((): string[] => [])).includes(file);
  });
}
