// SPDX-License-Identifier: AGPL-3.0-or-later
// The directory provider: PVE's hooks on a store of plain files.
import path from "node:path";
import { formatBytes, messageOf, RequestError, UnsupportedError } from "../core/index.ts";
import { type ClusterCompressor, createCompressor } from "../qcow2/index.ts";
import { type Point, Store } from "../store/index.ts";
import type {
  AttributeValue,
  BackupProvider,
  ContainerBackupInfo,
  GuestType,
  ProviderContext,
  VmBackupInfo,
  VmMechanism,
  VmVolume,
  VolumeEntry,
} from "./backup-provider.ts";
import { type DirectoryConfig, parseConfig } from "./config.ts";
import type { NbdTimeouts } from "./nbd-source.ts";
import { RestoreSession } from "./restore-session.ts";
import { VmBackup } from "./vm-backup.ts";
import { toVolumeEntry, toVolumeInfo } from "./volumes.ts";

const NO_CONTAINERS = "container backups are not part of this version";
const DEFAULT_TIMEOUTS: NbdTimeouts = { connectTimeoutMs: 30_000, replyTimeoutMs: 300_000 };

export interface DirectoryProviderOptions {
  /** Prefix before /etc/pve, /run and /var/lib, for tests beside a real system. */
  readonly root?: string;
  readonly timeouts?: NbdTimeouts;
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
  readonly #restores = new Map<string, RestoreSession>();
  #store: Promise<Store> | undefined;
  #compressor: ClusterCompressor | undefined;
  #backup: VmBackup | undefined;
  #lastJob: LastJob | undefined;

  /** @throws RequestError if the storage's section has an unknown option or value */
  constructor(context: ProviderContext, options: DirectoryProviderOptions = {}) {
    this.#context = context;
    this.#config = parseConfig(context.scfg);
    this.#root = options.root ?? "";
    this.#timeouts = options.timeouts ?? DEFAULT_TIMEOUTS;
  }

  async jobInit(): Promise<void> {
    await this.#openStore(); // a missing share is the job's error, not each guest's
    await this.#startCompressor();
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
    if (vmtype === "lxc") throw new UnsupportedError(`Cannot back up container ${vmid}: ${NO_CONTAINERS}`);
    const environment = {
      store: await this.#openStore(),
      root: this.#root,
      mode: this.#config.vmMode,
      compression: this.#config.compression,
      compressor: await this.#startCompressor(),
      timeouts: this.#timeouts,
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
    // A failure may follow a cleanup that was told of success: the point is known from there.
    const point = this.#lastJob?.vmid === vmid ? (this.#backup?.point ?? this.#lastJob.point) : undefined;
    await this.#endBackup();
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
    if (this.#config.vmMechanism === "file-handle") {
      throw new UnsupportedError(
        'Cannot back up with vm-backup-mechanism "file-handle": it is not part of this version',
        {
          hint: `set it to nbd: pvesm set ${this.#context.storeid} --vm-backup-mechanism nbd`,
        },
      );
    }
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

  backupContainerPrepare(vmid: number, _info: ContainerBackupInfo, _signal: AbortSignal): Promise<void> {
    return Promise.reject(new UnsupportedError(`Cannot back up container ${vmid}: ${NO_CONTAINERS}`));
  }

  backupContainer(vmid: number): Promise<void> {
    return Promise.reject(new UnsupportedError(`Cannot back up container ${vmid}: ${NO_CONTAINERS}`));
  }

  async restoreGetMechanism(
    volname: string,
    signal: AbortSignal,
  ): Promise<{ mechanism: "qemu-img" | "tar" | "directory"; vmtype: GuestType }> {
    const store = await this.#openStore();
    const point = await store.openPoint(volname, signal);
    if (point.type === "lxc") {
      throw new UnsupportedError(`Cannot restore "${point.volname}": restoring containers is not part of this version`);
    }
    return { mechanism: "qemu-img", vmtype: point.type };
  }

  async archiveGetGuestConfig(volname: string, signal: AbortSignal): Promise<Buffer> {
    const store = await this.#openStore();
    return await (await store.openPoint(volname, signal)).guestConfig();
  }

  async archiveGetFirewallConfig(volname: string, signal: AbortSignal): Promise<Buffer | undefined> {
    const store = await this.#openStore();
    return await (await store.openPoint(volname, signal)).firewallConfig();
  }

  async restoreVmInit(volname: string, signal: AbortSignal): Promise<ReadonlyMap<string, { readonly size: number }>> {
    await this.restoreVmCleanup(volname); // a second init of the same backup starts afresh
    const runDir = path.join(this.#root || "/", "run/pve-backup-host");
    const session = await RestoreSession.open(await this.#openStore(), volname, runDir, this.#warn, signal);
    this.#restores.set(volname, session);
    return session.sizes;
  }

  async restoreVmCleanup(volname: string): Promise<void> {
    const session = this.#restores.get(volname);
    this.#restores.delete(volname);
    await session?.[Symbol.asyncDispose]();
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

  restoreContainerInit(volname: string): Promise<never> {
    return Promise.reject(
      new UnsupportedError(`Cannot restore "${volname}": restoring containers is not part of this version`),
    );
  }

  async restoreContainerCleanup(): Promise<void> {
    // Comes after a refused init too.
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
    await this.#endBackup();
    await this.#compressor?.[Symbol.asyncDispose]();
    this.#compressor = undefined;
  }

  readonly #warn = (message: string): void => this.#context.log("warn", message);

  #backupOf(vmid: number): VmBackup {
    if (this.#backup?.vmid !== vmid) {
      throw new RequestError(`Cannot back up VM ${vmid}: backup_init was not called for it`);
    }
    return this.#backup;
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
