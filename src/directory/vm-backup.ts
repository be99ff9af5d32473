// SPDX-License-Identifier: AGPL-3.0-or-later
// One VM backup: from the question which disks may be incremental, to the committed point.
import { AlignedPool, type CopySource, copyDevice, POOL_SLOTS, READ_BYTES, Throttle } from "../block/index.ts";
import type { LogFunction } from "../core/index.ts";
import { CleanupStack, formatBytes, messageOf, RequestError } from "../core/index.ts";
import type { FileHandleCalls, VmBackupInfo, VmVolume } from "../provider/index.ts";
import {
  checkDeviceName,
  type GuestIdentity,
  parseVmgenid,
  readGuestIdentity,
  readGuestProcess,
} from "../pve/index.ts";
import { type ClusterCompressor, type Compression, Qcow2Chain, Qcow2Writer } from "../qcow2/index.ts";
import { explainLoss, FileHandleSource, NbdSource, type NbdTimeouts } from "../source/index.ts";
import {
  assertSound,
  type Base,
  backingFileName,
  deviceFileName,
  FIREWALL_CONFIG_FILE,
  GUEST_CONFIG_FILE,
  type GuestLock,
  type OpenChain,
  type Point,
  type StagedDevice,
  type StagedPoint,
  type Store,
} from "../store/index.ts";

interface VmBackupEnvironment {
  readonly store: Store;
  readonly storeid: string;
  readonly root: string;
  readonly mode: "full" | "incremental";
  readonly compression: Compression;
  /** Started with the job; undefined for compression "none". */
  readonly compressor: ClusterCompressor | undefined;
  readonly timeouts: NbdTimeouts;
  /** Present where a Perl side can be asked about its file handles. */
  readonly fileHandles: FileHandleCalls | undefined;
  readonly log: LogFunction;
}

/** How a device is backed up now. */
type Decision =
  | { readonly mode: "incremental"; readonly base: Point; readonly chain: Qcow2Chain }
  | { readonly mode: "full"; readonly reason: string };

/** Owned by the provider from backup_init to backup_cleanup. */
export class VmBackup implements AsyncDisposable {
  readonly vmid: number;
  readonly #environment: VmBackupEnvironment;
  readonly #owned: CleanupStack;
  readonly #lock: GuestLock;
  readonly #staged: StagedPoint;
  /** Held from the question to the commit, so it cannot be removed in between. */
  #base: Base | undefined;
  /** Readers of the base by device: the backup builds on exactly what was checked at the question. */
  readonly #readers = new Map<string, Qcow2Chain>();
  /** Why devices that were asked for are backed up in full. */
  #reasons: ReadonlyMap<string, string> = new Map();
  #point: Point | undefined;

  private constructor(environment: VmBackupEnvironment, lock: GuestLock, staged: StagedPoint, owned: CleanupStack) {
    this.vmid = lock.vmid;
    this.#environment = environment;
    this.#lock = lock;
    this.#staged = staged;
    this.#owned = owned;
  }

  /**
   * Takes the guest's lock, makes sure that the name is free, and sweeps what dead jobs left.
   *
   * @throws LockedError while another job backs up the guest; PointExistsError; StoreUnavailableError
   */
  static async begin(
    environment: VmBackupEnvironment,
    vmid: number,
    epoch: number,
    signal: AbortSignal,
  ): Promise<VmBackup> {
    await using stack = new CleanupStack();
    const lock = stack.use(await environment.store.lockGuest(vmid, signal));
    const staged = stack.use(await environment.store.beginPoint({ lock, type: "qemu", epoch, signal }));
    return new VmBackup(environment, lock, staged, stack.move());
  }

  get archiveName(): string {
    return this.#staged.name.archive;
  }

  /** The committed point; undefined until the data is safe. */
  get point(): Point | undefined {
    return this.#point;
  }

  /** Rule: nothing in mode full; per device "use" where a usable base exists, else "new". */
  async queryIncremental(
    volumes: ReadonlyMap<string, { readonly size: number }>,
    signal: AbortSignal,
  ): Promise<ReadonlyMap<string, "new" | "use">> {
    const { mode, root, store } = this.#environment;
    if (mode === "full") return new Map();
    // PVE may ask twice: the last answer counts.
    await this.#base?.[Symbol.asyncDispose]();
    this.#base = undefined;
    this.#readers.clear();
    const guest = await readGuestIdentity(this.vmid, root);
    const check = (base: Point, device: string, chain: OpenChain) => this.#check(base, device, chain, signal);
    const { base, reasons } = await store.findBase({ vmid: this.vmid, devices: volumes, guest, signal }, check);
    if (base !== undefined) this.#base = this.#owned.use(base);
    this.#reasons = reasons;
    return new Map([...volumes.keys()].map((device) => [device, base?.chains.has(device) === true ? "use" : "new"]));
  }

  /** A base must be sound all the way down and readable; otherwise it is not a base. */
  async #check(base: Point, device: string, chain: OpenChain, signal: AbortSignal): Promise<void> {
    await this.#environment.store.assertChainSound(`build on "${base.volname}"`, this.vmid, chain, signal);
    const reader = await Qcow2Chain.over(chain.files, signal, chain.headers);
    await chain.assertUnchanged("everything");
    this.#readers.set(device, reader);
  }

  /**
   * Copies, checks and commits. When this returns, or when `point` is set, the backup is safe and stays.
   *
   * @throws BaseUnusableError if QEMU gives only the changes since a base that has disappeared meanwhile; LockedError
   *   if another host took this one for dead
   */
  async run(
    guestConfig: Buffer,
    volumes: ReadonlyMap<string, VmVolume>,
    info: VmBackupInfo,
    signal: AbortSignal,
  ): Promise<Point> {
    try {
      return await this.#run(guestConfig, volumes, info, AbortSignal.any([signal, this.#lock.lost]));
    } catch (error) {
      // The process that broke our lock has swept our files, too: the first failure is then a missing file.
      throw signal.aborted ? error : await this.#lock.causeOf(error);
    }
  }

  async #run(
    guestConfig: Buffer,
    volumes: ReadonlyMap<string, VmVolume>,
    info: VmBackupInfo,
    signal: AbortSignal,
  ): Promise<Point> {
    const { log } = this.#environment;
    const guest = await this.#guestIdentity(guestConfig);
    for (const device of volumes.keys()) checkDeviceName(device);
    if ([...volumes.values()].some(({ bitmapMode }) => bitmapMode === "reuse"))
      await this.#base?.recheck(guest, signal);
    await this.#staged.writeFile(GUEST_CONFIG_FILE, guestConfig);
    if (info.firewallConfig !== undefined) await this.#staged.writeFile(FIREWALL_CONFIG_FILE, info.firewallConfig);
    if (this.#environment.mode === "full") log("info", FULL_MODE_HINT);
    using pool = new AlignedPool(READ_BYTES, POOL_SLOTS);
    const throttle = new Throttle(info.bandwidthLimit);
    const devices: StagedDevice[] = [];
    for (const [device, volume] of [...volumes].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const decision = this.#decide(device, volume);
      const job = { device, volume, decision, pool, throttle, signal };
      devices.push(
        await this.#backUpDevice(job).catch((error: unknown) => {
          throw explainLoss(this.vmid, device, error);
        }),
      );
    }
    const point = await this.#staged.commit({ devices, base: this.#base, process: guest.process }, signal);
    this.#point = point;
    log("info", `backup "${point.volname}" is complete: ${formatBytes(point.occupiedBytes)} on the storage`);
    // Notes, protection and retention come next, without our lock. The backup is safe: nothing may fail it now.
    await this[Symbol.asyncDispose]().catch((error: unknown) => log("warn", messageOf(error)));
    return point;
  }

  /** Releases the lock and the base; removes what was not committed. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }

  /** The vmgenid comes from the config that PVE backs up, the process from the node. */
  async #guestIdentity(guestConfig: Buffer): Promise<GuestIdentity> {
    const vmgenid = parseVmgenid(guestConfig);
    const process = await readGuestProcess(this.vmid, this.#environment.root);
    return { ...(vmgenid === undefined ? {} : { vmgenid }), ...(process === undefined ? {} : { process }) };
  }

  #decide(device: string, { bitmapMode }: VmVolume): Decision {
    const chain = this.#readers.get(device);
    if (bitmapMode === "reuse") {
      const base = this.#base?.point;
      if (base === undefined || chain === undefined) {
        throw new RequestError(`Cannot back up "${device}": PVE reuses a bitmap that this storage did not ask for`);
      }
      return { mode: "incremental", base, chain };
    }
    if (this.#environment.mode === "full") return { mode: "full", reason: "vm-backup-mode is full" };
    if (chain !== undefined) return { mode: "full", reason: "QEMU has no bitmap of it, or started a new one" };
    const reason = this.#reasons.get(device);
    if (reason === undefined) return { mode: "full", reason: "PVE did not ask for an incremental backup of it" };
    return { mode: "full", reason };
  }

  async #backUpDevice(job: DeviceJob): Promise<StagedDevice> {
    const { compression, compressor, log } = this.#environment;
    const { decision, device, signal, volume } = job;
    await using stack = new CleanupStack();
    const source = stack.use(await this.#openSource(device, volume, signal));
    const below = decision.mode === "incremental" ? decision : undefined;
    const backing: { file: string; format: "qcow2" } | undefined =
      below === undefined ? undefined : { file: backingFileName(below.base.folderName, device), format: "qcow2" };
    const file = this.#staged.newFile(deviceFileName(device));
    const target = stack.use(
      await Qcow2Writer.create({ file, virtualBytes: volume.size, backing, compression, compressor, signal }),
    );
    const copied = await copyDevice({
      device,
      source,
      target,
      base: below?.chain,
      pool: job.pool,
      throttle: job.throttle,
      log,
      onStart: (totalBytes) => log("info", describe(device, volume, decision, totalBytes)),
      signal,
    });
    const image = await target.finish();
    log("info", copied.summary);
    await using written = await this.#staged.openFile(deviceFileName(device));
    await assertSound(`commit "${device}"`, written, signal); // read back
    return {
      name: device,
      virtualBytes: volume.size,
      reason: decision.mode === "full" ? decision.reason : "",
      isIncremental: below !== undefined,
      compression,
      readBytes: copied.readBytes,
      writtenBytes: image.fileBytes,
      zeroBytes: copied.zeroBytes,
      fileBytes: image.fileBytes,
      digest: image.digest,
    };
  }

  async #openSource(device: string, volume: VmVolume, signal: AbortSignal): Promise<CopySource & AsyncDisposable> {
    const { fileHandles: calls, log, storeid, timeouts } = this.#environment;
    const { fileHandle: handle } = volume;
    if (handle === undefined) return await NbdSource.open(device, volume, timeouts, signal);
    if (calls === undefined) throw new RequestError(`Cannot back up "${device}": its dirty regions cannot be queried`);
    return await FileHandleSource.open({ device, volume, handle, storeid, calls, timeouts, log }, signal);
  }
}

/** The default is that of the upstream example: an administrator who expects increments must be told. */
const FULL_MODE_HINT =
  'backing up in full: set "vm-backup-mode incremental" for this storage in storage.cfg to back up only what changed';

interface DeviceJob {
  readonly device: string;
  readonly volume: VmVolume;
  readonly decision: Decision;
  readonly pool: AlignedPool;
  readonly throttle: Throttle;
  readonly signal: AbortSignal;
}

function describe(device: string, volume: VmVolume, decision: Decision, totalBytes: number): string {
  const size = formatBytes(volume.size);
  return decision.mode === "incremental"
    ? `${device}: incremental backup (${formatBytes(totalBytes)} of ${size} changed since "${decision.base.volname}")`
    : `${device}: full backup of ${size} (${decision.reason})`;
}
