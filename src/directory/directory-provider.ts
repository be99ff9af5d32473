// SPDX-License-Identifier: AGPL-3.0-or-later
// The directory provider: PVE's hooks on a store of plain files.
import path from "node:path";
import { EnvironmentError, formatBytes, messageOf, RequestError, UnsupportedError } from "../core/index.ts";
import { nbdHost } from "../device/index.ts";
import { loadDigestLibrary } from "../digest/index.ts";
import type {
  AttributeValue,
  BackupProvider,
  ContainerBackupInfo,
  ContainerDescriptors,
  ContainerHandoff,
  ContainerOffer,
  GuestType,
  ProviderContext,
  VmBackupInfo,
  VmMechanism,
  VmVolume,
  VolumeEntry,
} from "../provider/index.ts";
import { type ClusterCompressor, createCompressor } from "../qcow2/index.ts";
import type { NbdTimeouts } from "../source/index.ts";
import { type LockTiming, type Point, Store } from "../store/index.ts";
import { type DirectoryConfig, parseConfig } from "./config.ts";
import { archiveContainer } from "./container/container-archiver.ts";
import { ContainerBackup } from "./container/container-backup.ts";
import { ContainerRestore, containerMechanism } from "./container/container-restore.ts";
import { PointsInRestore } from "./points-in-restore.ts";
import { RestoreSession } from "./restore-session.ts";
import { VmBackup } from "./vm-backup.ts";
import { toVolumeEntry, toVolumeInfo } from "./volumes.ts";

export interface DirectoryProviderOptions {
  /** Prefix before /etc/pve, /run and /var/lib, for tests beside a real system. */
  readonly root?: string;
  /** In place of the storage's dir-nbd-timeout. */
  readonly timeouts?: NbdTimeouts;
  /** For tests: how lively locks are, and how long a dead host's are respected. */
  readonly lockTiming?: LockTiming;
}

/** The guest being backed up, and what became of it: the log file arrives after the cleanup. */
interface LastJob {
  readonly vmid: number;
  readonly type: GuestType;
  readonly epoch: number;
  /** The committed backup; undefined after a failure. */
  readonly point: Point | undefined;
}

export class DirectoryProvider implements BackupProvider {
  readonly name = "directory";
  readonly #context: ProviderContext;
  readonly #config: DirectoryConfig;
  readonly #root: string;
  readonly #timeouts: NbdTimeouts;
  readonly #lockTiming: LockTiming | undefined;
  readonly #restores = new Map<string, RestoreSession>();
  readonly #containerRestores = new Map<string, ContainerRestore>();
  readonly #points = new PointsInRestore();
  #store: Promise<Store> | undefined;
  #compressor: ClusterCompressor | undefined;
  #backup: VmBackup | ContainerBackup | undefined;
  #lastJob: LastJob | undefined;

  /** @throws RequestError if the storage's section has an unknown option or value */
  constructor(context: ProviderContext, options: DirectoryProviderOptions = {}) {
    this.#context = context;
    this.#config = parseConfig(context.scfg);
    this.#root = options.root ?? "";
    this.#lockTiming = options.lockTiming;
    const waitMs = this.#config.nbdTimeoutSeconds * 1000;
    this.#timeouts = options.timeouts ?? { connectTimeoutMs: waitMs, replyTimeoutMs: waitMs };
  }

  async jobInit(): Promise<void> {
    await this.#openStore(); // a missing share is the job's error, not each guest's
    await this.#startCompressor();
    loadDigestLibrary(); // an upgrade of the package during the job changes nothing
    const { compression } = this.#config;
    this.#context.log(
      "info",
      `compression is ${compression} (dir-compression of storage "${this.#context.storeid}"); ` +
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
    await this.#endBackup(); // a guest before this one may have ended without a cleanup
    this.#lastJob = { vmid, type: vmtype, epoch: startTime, point: undefined };
    if (vmtype === "lxc") {
      const store = await this.#openStore();
      const environment = { store, format: this.#config, runDir: this.#runDir, log: this.#context.log };
      this.#backup = await ContainerBackup.begin(environment, vmid, startTime, signal);
      return { archiveName: this.#backup.archiveName };
    }
    const environment = {
      store: await this.#openStore(),
      storeid: this.#context.storeid,
      root: this.#root,
      mode: this.#config.vmMode,
      compression: this.#config.compression,
      compressor: await this.#startCompressor(),
      timeouts: this.#timeouts,
      fileHandles: this.#context.fileHandles,
      log: this.#context.log,
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
    // A failure may follow a cleanup that was told of success: the point is known from there.
    const point = this.#lastJob?.vmid === vmid ? (backup?.point ?? this.#lastJob.point) : undefined;
    if (point === undefined && success) {
      // PVE does not notice when the child that backs up a container is killed.
      throw new EnvironmentError(`Cannot finish the backup of guest ${vmid}: it was not committed, so there is none`);
    }
    if (point === undefined) return { archiveSize: 0 };
    this.#lastJob = { vmid, type: point.type, epoch: point.epoch, point };
    if (!success) {
      // QEMU was told "success" by then and has cleared its bitmap: without this point the next one would lie.
      this.#context.log(
        "warn",
        `backup "${point.volname}" was complete before the job failed and is kept (${formatBytes(point.occupiedBytes)})` +
          (error === undefined ? "" : `; the failure was: ${error}`),
      );
    }
    return { archiveSize: point.occupiedBytes };
  }

  async backupGetMechanism(_vmid: number, vmtype: GuestType): Promise<VmMechanism | "directory"> {
    if (vmtype === "lxc") return "directory";
    return this.#config.vmMechanism;
  }

  async backupHandleLogFile(vmid: number, filename: string): Promise<void> {
    const job = this.#lastJob;
    if (job?.vmid !== vmid) return;
    try {
      const store = await this.#openStore();
      if (job.point === undefined) await store.keepFailedLog(job, filename);
      else await store.storeLog(job.point, filename);
    } catch (error) {
      this.#context.log("warn", `the job's log could not be kept on the storage: ${messageOf(error)}`);
    }
  }

  async backupVmQueryIncremental(
    vmid: number,
    volumes: ReadonlyMap<string, { readonly size: number }>,
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
  ): Promise<ContainerHandoff> {
    return await this.#containerBackupOf(vmid).prepare(info, signal);
  }

  async backupContainer(
    _vmid: number,
    guestConfig: Buffer,
    excludePatterns: readonly string[],
    info: ContainerBackupInfo,
    descriptors: ContainerDescriptors,
    signal: AbortSignal,
  ): Promise<void> {
    const job = { format: this.#config, info, excludePatterns, log: this.#context.log, signal };
    await archiveContainer(job, descriptors, guestConfig);
  }

  async restoreGetMechanism(
    volname: string,
    _signal: AbortSignal,
  ): Promise<{ mechanism: "qemu-img" | "tar" | "directory"; vmtype: GuestType }> {
    const store = await this.#openStore();
    const point = await this.#points.point(store, volname);
    const mechanism = point.type === "lxc" ? containerMechanism(point) : "qemu-img";
    return { mechanism, vmtype: point.type };
  }

  async archiveGetGuestConfig(volname: string, _signal: AbortSignal): Promise<Buffer> {
    const store = await this.#openStore();
    return await (await this.#points.point(store, volname)).guestConfig();
  }

  async archiveGetFirewallConfig(volname: string, _signal: AbortSignal): Promise<Buffer | undefined> {
    const store = await this.#openStore();
    return await (await this.#points.point(store, volname)).firewallConfig();
  }

  async restoreVmInit(volname: string, signal: AbortSignal): Promise<ReadonlyMap<string, { readonly size: number }>> {
    await this.#endRestore(volname); // a second init of the same backup starts afresh
    const environment = {
      store: await this.#openStore(),
      runDir: this.#runDir,
      host: nbdHost(this.#root),
      deviceView: this.#config.deviceView,
      warn: this.#warn,
    };
    const points = await this.#points.pointsOf(environment.store, volname);
    const session = await RestoreSession.open(environment, points, volname, signal);
    this.#restores.set(volname, session);
    return session.sizes;
  }

  async restoreVmCleanup(volname: string): Promise<void> {
    try {
      await this.#endRestore(volname);
    } finally {
      await this.#points.forget(volname);
    }
  }

  async restoreVmVolumeInit(volname: string, device: string, signal: AbortSignal): Promise<{ qemuImgPath: string }> {
    const session = this.#restores.get(volname);
    if (session === undefined) {
      throw new RequestError(`Cannot restore "${device}": the restore of "${volname}" was not begun`);
    }
    return { qemuImgPath: await session.offer(device, signal) };
  }

  async restoreVmVolumeCleanup(volname: string, device: string): Promise<void> {
    await this.#restores.get(volname)?.withdraw(device);
  }

  async restoreContainerInit(volname: string, signal: AbortSignal): Promise<ContainerOffer> {
    await this.#takeContainerRestore(volname)?.[Symbol.asyncDispose](); // a second init of the same backup starts afresh
    const environment = { store: await this.#openStore(), runDir: this.#runDir, warn: this.#warn };
    const points = await this.#points.pointsOf(environment.store, volname);
    const restore = await ContainerRestore.open(environment, points, volname, signal);
    this.#containerRestores.set(volname, restore);
    return restore.offer;
  }

  async restoreContainerCleanup(volname: string): Promise<void> {
    try {
      await this.#takeContainerRestore(volname)?.withdraw();
    } finally {
      await this.#points.forget(volname);
    }
  }

  async listVolumes(vmid: number | undefined, signal: AbortSignal): Promise<VolumeEntry[]> {
    const store = await this.#openStore();
    const points = await store.listPoints(vmid === undefined ? {} : { vmid }, signal);
    return points.map(toVolumeEntry);
  }

  async volumeInfo(volname: string, signal: AbortSignal): ReturnType<BackupProvider["volumeInfo"]> {
    const store = await this.#openStore();
    return toVolumeInfo(await store.openPoint(volname, signal));
  }

  async getVolumeAttribute(volname: string, attribute: string, signal: AbortSignal): Promise<AttributeValue> {
    if (attribute !== "notes" && attribute !== "protected") return undefined;
    const store = await this.#openStore();
    const attributes = await store.readAttributes(volname, signal);
    return attribute === "notes" ? (attributes.notes ?? "") : Number(attributes.protected);
  }

  async updateVolumeAttribute(
    volname: string,
    attribute: string,
    value: AttributeValue,
    signal: AbortSignal,
  ): Promise<void> {
    const store = await this.#openStore();
    if (attribute === "notes") {
      await store.updateAttributes(volname, { notes: value === undefined ? "" : String(value) }, signal);
    } else if (attribute === "protected") {
      await store.updateAttributes(volname, { protected: value !== undefined && Number(value) !== 0 }, signal);
    } else {
      throw new RequestError(`Cannot set attribute "${attribute}": a backup has "notes" and "protected" only`);
    }
  }

  freeVolume(volname: string): Promise<void> {
    return Promise.reject(
      new UnsupportedError(
        `Cannot remove "${volname}": removing backups is not part of this version, nothing was removed`,
      ),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const volname of [...this.#restores.keys()]) await this.restoreVmCleanup(volname);
    for (const volname of [...this.#containerRestores.keys()])
      await this.#takeContainerRestore(volname)?.[Symbol.asyncDispose]();
    await this.#points[Symbol.asyncDispose]();
    await this.#endBackup();
    await this.#compressor?.[Symbol.asyncDispose]();
    this.#compressor = undefined;
    const store = await this.#store?.catch(() => undefined);
    this.#store = undefined;
    await store?.[Symbol.asyncDispose]();
  }

  async #endRestore(volname: string): Promise<void> {
    const session = this.#restores.get(volname);
    this.#restores.delete(volname);
    await session?.[Symbol.asyncDispose]();
  }

  readonly #warn = (message: string): void => this.#context.log("warn", message);

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

  #takeContainerRestore(volname: string): ContainerRestore | undefined {
    const restore = this.#containerRestores.get(volname);
    this.#containerRestores.delete(volname);
    return restore;
  }

  /** For mounts and sockets of this process, on the node itself. */
  get #runDir(): string {
    return path.join(this.#root || "/", "run/pve-backup-host");
  }

  async #endBackup(): Promise<void> {
    const backup = this.#backup;
    this.#backup = undefined;
    await backup?.[Symbol.asyncDispose]();
  }

  #openStore(): Promise<Store> {
    this.#store ??= Store.open({
      path: this.#config.path,
      storeid: this.#context.storeid,
      root: this.#root,
      nodename: this.#context.nodename,
      warn: this.#warn,
      ...(this.#lockTiming === undefined ? {} : { timing: this.#lockTiming }),
    }).catch((error: unknown) => {
      this.#store = undefined; // the share may be back at the next call
      throw error;
    });
    return this.#store;
  }

  async #startCompressor(): Promise<ClusterCompressor | undefined> {
    if (this.#compressor?.hasFailed === true) {
      await this.#compressor[Symbol.asyncDispose](); // one guest's trouble must not be the next one's
      this.#compressor = undefined;
    }
    if (this.#config.compression !== "none") this.#compressor ??= await createCompressor(this.#config.compression);
    return this.#compressor;
  }
}
