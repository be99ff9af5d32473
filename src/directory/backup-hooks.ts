// SPDX-License-Identifier: AGPL-3.0-or-later
// A backup job, hook by hook: one guest after the other, each with its lock, and its log file after its cleanup.
import { EnvironmentError, formatBytes, messageOf, RequestError } from "../core/index.ts";
import { loadDigestLibrary } from "../digest/index.ts";
import type {
  BackupHooks,
  ContainerBackupInfo,
  DeviceSizes,
  GuestType,
  HandleToOpen,
  VmBackupInfo,
  VmMechanism,
  VmVolume,
} from "../provider/index.ts";
import { type ClusterCompressor, createCompressor } from "../qcow2/index.ts";
import type { Point } from "../store/index.ts";
import { archiveContainer } from "./container/container-archiver.ts";
import { ContainerBackup } from "./container/container-backup.ts";
import type { StorageAccess } from "./storage-access.ts";
import { VmBackup } from "./vm-backup.ts";

/** The guest being backed up, and its result: the log file arrives after the cleanup. */
interface LastJob {
  readonly vmid: number;
  readonly type: GuestType;
  readonly epoch: number;
  /** The committed backup; undefined after a failure. */
  readonly point: Point | undefined;
}

export class DirectoryBackupHooks implements BackupHooks, AsyncDisposable {
  readonly #access: StorageAccess;
  #compressor: ClusterCompressor | undefined;
  #backup: VmBackup | ContainerBackup | undefined;
  #lastJob: LastJob | undefined;

  constructor(access: StorageAccess) {
    this.#access = access;
  }

  async jobInit(): Promise<void> {
    await this.#access.openStore(); // a missing share is the job's error, not each guest's
    await this.#startCompressor();
    loadDigestLibrary(); // an upgrade of the package during the job changes nothing
    const { compression } = this.#access.config;
    this.#access.context.log(
      "info",
      `compression is ${compression} (dir-compression of storage "${this.#access.context.storeid}"); ` +
        "the job's own compress, zstd, pigz and performance settings have no effect here",
    );
  }

  async jobCleanup(_signal: AbortSignal): Promise<void> {
    await this.#endBackup();
    await this.#compressor?.[Symbol.asyncDispose]();
    this.#compressor = undefined;
  }

  async backupInit(
    vmid: number,
    vmtype: GuestType,
    startTime: number,
    signal: AbortSignal,
  ): Promise<{ archiveName: string }> {
    await this.#endBackup(); // the previous guest may have ended without a cleanup
    this.#lastJob = { vmid, type: vmtype, epoch: startTime, point: undefined };
    if (vmtype === "lxc") {
      const store = await this.#access.openStore();
      const environment = {
        store,
        format: this.#access.config,
        runDir: this.#access.runDir,
        log: this.#access.context.log,
      };
      this.#backup = await ContainerBackup.begin(environment, vmid, startTime, signal);
      return { archiveName: this.#backup.archiveName };
    }
    const environment = {
      store: await this.#access.openStore(),
      storeid: this.#access.context.storeid,
      root: this.#access.root,
      mode: this.#access.config.vmMode,
      fullReadEveryDays: this.#access.config.fullReadEveryDays,
      compression: this.#access.config.compression,
      compressor: await this.#startCompressor(),
      timeouts: this.#access.timeouts,
      fileHandles: this.#access.context.fileHandles,
      log: this.#access.context.log,
    };
    this.#backup = await VmBackup.begin(environment, vmid, startTime, signal);
    return { archiveName: this.#backup.archiveName };
  }

  async backupCleanup(
    vmid: number,
    _vmtype: GuestType | undefined,
    success: boolean,
    error: string | undefined,
    _signal: AbortSignal,
  ): Promise<{ archiveSize: number }> {
    const backup = this.#backup;
    await this.#endBackup(); // waits for a commit that is under way
    // A failure may follow a cleanup called with success: the point is known from there.
    const point = this.#lastJob?.vmid === vmid ? (backup?.point ?? this.#lastJob.point) : undefined;
    if (point === undefined && success) {
      // PVE does not notice when the child that backs up a container is killed.
      throw new EnvironmentError(
        `Cannot finish the backup of guest ${vmid}: nothing was committed, so there is no backup`,
      );
    }
    if (point === undefined) return { archiveSize: 0 };
    this.#lastJob = { vmid, type: point.type, epoch: point.epoch, point };
    if (!success) {
      // QEMU was told "success" by then and has cleared its bitmap: without this point the next one would lie.
      this.#access.context.log(
        "warn",
        `backup "${point.volname}" was complete before the job failed and is kept (${formatBytes(point.occupiedBytes)})` +
          (error === undefined ? "" : `; the failure was: ${error}`),
      );
    }
    return { archiveSize: point.occupiedBytes };
  }

  async backupGetMechanism(_vmid: number, vmtype: GuestType): Promise<VmMechanism | "directory"> {
    if (vmtype === "lxc") return "directory";
    return this.#access.config.vmMechanism;
  }

  async backupHandleLogFile(vmid: number, filename: string): Promise<void> {
    const job = this.#lastJob;
    if (job?.vmid !== vmid) return;
    try {
      const store = await this.#access.openStore();
      if (job.point === undefined) await store.keepFailedLog(job, filename);
      else await store.storeLog(job.point, filename);
    } catch (error) {
      this.#access.context.log("warn", `the job's log could not be kept on the storage: ${messageOf(error)}`);
    }
  }

  async backupVmQueryIncremental(
    vmid: number,
    volumes: DeviceSizes,
    signal: AbortSignal,
  ): Promise<ReadonlyMap<string, "new" | "use">> {
    return await this.#backupOf(vmid).queryIncremental(volumes, signal);
  }

  async backupVm(
    vmid: number,
    guestConfig: Buffer,
    volumes: ReadonlyMap<string, VmVolume>,
    info: VmBackupInfo,
    signal: AbortSignal,
  ): Promise<void> {
    await this.#backupOf(vmid).run(guestConfig, volumes, info, signal);
  }

  async backupContainerPrepare(
    vmid: number,
    info: ContainerBackupInfo,
    signal: AbortSignal,
  ): Promise<readonly HandleToOpen[]> {
    return await this.#containerBackupOf(vmid).prepare(info, signal);
  }

  async backupContainer(
    _vmid: number,
    guestConfig: Buffer,
    excludePatterns: readonly string[],
    info: ContainerBackupInfo,
    handles: readonly number[],
    signal: AbortSignal,
  ): Promise<void> {
    const job = { format: this.#access.config, info, excludePatterns, log: this.#access.context.log, signal };
    await archiveContainer(job, handles, guestConfig);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#endBackup();
    await this.#compressor?.[Symbol.asyncDispose]();
    this.#compressor = undefined;
  }

  #backupOf(vmid: number): VmBackup {
    if (this.#backup?.vmid !== vmid || !(this.#backup instanceof VmBackup)) {
      throw new RequestError(`Cannot back up VM ${vmid}: backup_init was not called for it`);
    }
    return this.#backup;
  }

  #containerBackupOf(vmid: number): ContainerBackup {
    if (this.#backup?.vmid !== vmid || !(this.#backup instanceof ContainerBackup)) {
      throw new RequestError(`Cannot back up container ${vmid}: backup_init was not called for it`);
    }
    return this.#backup;
  }

  async #endBackup(): Promise<void> {
    const backup = this.#backup;
    this.#backup = undefined;
    await backup?.[Symbol.asyncDispose]();
  }

  async #startCompressor(): Promise<ClusterCompressor | undefined> {
    if (this.#compressor?.hasFailed === true) {
      await this.#compressor[Symbol.asyncDispose](); // one guest's trouble must not affect the next one
      this.#compressor = undefined;
    }
    if (this.#access.config.compression !== "none")
      this.#compressor ??= await createCompressor(this.#access.config.compression);
    return this.#compressor;
  }
}
