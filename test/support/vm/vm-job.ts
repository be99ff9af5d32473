// SPDX-License-Identifier: AGPL-3.0-or-later
// Plays vzdump and qmrestore on a provider in this process, in PVE's order, with a failure at any chosen place.
import { writeFile } from "node:fs/promises";
import path from "node:path";
import type { LabBackup, LabGuest } from "../../../fixtures/lab/index.ts";
import type { DirectoryProviderOptions } from "../../../src/directory/storage-access.ts";
import type { TestNode } from "../node/test-node.ts";
import type { HandedOver } from "./file-handles.ts";

const never = new AbortController().signal;

/** Where a job can fail, in the order of PVE's calls. */
export type FailAt =
  | "backup_init" // PVE fails right after it
  | "query" // backup-access-setup refuses after the question
  | "backup_vm" // the job is cancelled in mid-copy
  | "after_backup_vm"; // protection or retention fails: QEMU was told "success"

export interface JobOptions {
  readonly epoch: number;
  readonly failAt?: FailAt | undefined;
  /** Runs while the backup runs, e.g. guest writes. */
  readonly during?: (() => Promise<void>) | undefined;
  readonly oracleDir?: string;
  readonly firewallConfig?: Buffer;
  readonly bandwidthLimit?: number;
  /** Capacity of each fleecing image. */
  readonly fleecingBytes?: number;
  /** Cancels backup_vm. */
  readonly signal?: AbortSignal;
  /** How long the provider waits for QEMU and for nbdfuse. */
  readonly timeouts?: DirectoryProviderOptions["timeouts"];
  /** Passes the devices as files, not as NBD exports. */
  readonly handOver?: (access: LabBackup) => Promise<HandedOver>;
  /** Runs between the answers and the backup access: what may happen to the store meanwhile. */
  readonly afterQuery?: (() => Promise<void>) | undefined;
}

export interface JobResult {
  /** Undefined if the job failed. */
  readonly volname: string | undefined;
  readonly error: unknown;
  readonly modes: ReadonlyMap<string, "new" | "use">;
  /** Raw copies of the disks at the time of the backup, if an oracleDir was given. */
  readonly oracles: ReadonlyMap<string, string>;
  readonly log: readonly string[];
}

class InjectedFailure extends Error {}

/** One vzdump job of one running VM. Never rejects: a failure is part of the result, as in PVE. */
export async function backUp(node: TestNode, guest: LabGuest, options: JobOptions): Promise<JobResult> {
  const { vmid } = guest;
  const logStart = node.log.length;
  const { timeouts } = options;
  await using provider = node.provider({}, timeouts === undefined ? {} : { timeouts });
  let access: LabBackup | undefined;
  let modes: ReadonlyMap<string, "new" | "use"> = new Map();
  let volname: string | undefined;
  let failure: unknown;
  const mayFail = (at: FailAt): void => {
    if (options.failAt === at) throw new InjectedFailure(`injected at ${at}`);
  };
  try {
    await provider.backup.jobInit();
    const { archiveName } = await provider.backup.backupInit(vmid, "qemu", options.epoch, never);
    mayFail("backup_init");
    modes = await provider.backup.backupVmQueryIncremental(vmid, guest.devices, never);
    await options.afterQuery?.();
    mayFail("query");
    access = await guest.openBackup({
      modes,
      ...(options.oracleDir === undefined ? {} : { oracleDir: options.oracleDir }),
      ...(options.fleecingBytes === undefined ? {} : { fleecingBytes: options.fleecingBytes }),
    });
    const cancel = new AbortController();
    const info = { bandwidthLimit: options.bandwidthLimit ?? 0, firewallConfig: options.firewallConfig };
    const signal = AbortSignal.any([cancel.signal, options.signal ?? never]);
    node.handedOver = await options.handOver?.(access);
    const volumes = node.handedOver?.volumes ?? access.vmVolumes();
    const backup = provider.backup.backupVm(vmid, Buffer.from(guest.guestConfig), volumes, info, signal);
    if (options.failAt === "backup_vm") setTimeout(() => cancel.abort(new InjectedFailure("cancelled")), 15).unref();
    const [copied, meanwhile] = await Promise.allSettled([backup, options.during?.()]);
    if (copied.status === "rejected") throw copied.reason;
    if (meanwhile.status === "rejected") throw meanwhile.reason;
    await node.handedOver?.[Symbol.asyncDispose]();
    await access.finish(true); // PVE tells QEMU "success" as soon as backup_vm has returned
    mayFail("after_backup_vm");
    await provider.backup.backupCleanup(vmid, "qemu", true, undefined, never);
    volname = `backup/${archiveName}`;
  } catch (error) {
    failure = error;
    await node.handedOver?.[Symbol.asyncDispose]();
    await access?.finish(false);
    await provider.backup.backupCleanup(vmid, "qemu", false, String(error), never);
  }
  const taskLog = path.join(node.dir, "task.log");
  await writeFile(taskLog, "INFO: task log\n");
  await provider.backup.backupHandleLogFile(vmid, taskLog);
  await provider.backup.jobCleanup(never);
  return { volname, error: failure, modes, oracles: access?.oracles ?? new Map(), log: node.log.slice(logStart) };
}

/** What qmrestore does with every disk; `take` gets the raw file as PVE's qemu-img convert would. */
export async function restore(
  node: TestNode,
  volname: string,
  take: (device: string, rawPath: string, sizeBytes: number) => Promise<void>,
): Promise<{ guestConfig: Buffer; firewallConfig: Buffer | undefined; devices: string[] }> {
  await using provider = node.provider();
  await provider.restore.restoreGetMechanism(volname, never);
  try {
    const devices = await provider.restore.restoreVmInit(volname, never);
    const guestConfig = await provider.restore.archiveGetGuestConfig(volname, never);
    const firewallConfig = await provider.restore.archiveGetFirewallConfig(volname, never);
    for (const [device, { size }] of devices) {
      const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(volname, device, never);
      try {
        await take(device, qemuImgPath, size);
      } finally {
        await provider.restore.restoreVmVolumeCleanup(volname, device);
      }
    }
    return { guestConfig, firewallConfig, devices: [...devices.keys()] };
  } finally {
    await provider.restore.restoreVmCleanup(volname);
  }
}

/** Volume names of all listed backups. */
export async function list(node: TestNode, vmid: number): Promise<string[]> {
  await using provider = node.provider();
  return (await provider.storage.listVolumes(vmid, never)).map((entry) => entry.volname);
}
