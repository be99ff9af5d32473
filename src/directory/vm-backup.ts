// SPDX-License-Identifier: AGPL-3.0-or-later
// One VM backup: from the question which disks may be incremental, to the committed point.
import { AlignedPool, type CopySource, copyDevice, POOL_SLOTS, READ_BYTES, Throttle } from "../block/index.ts";
import type { LogFunction } from "../core/index.ts";
import { CleanupStack, formatBytes, HostError, messageOf, RequestError } from "../core/index.ts";
import type { RegularFile } from "../host/index.ts";
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
  backingFileName,
  type ChainLock,
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

/** What was promised for a device when PVE asked. */
type Promised = PromisedBase | { readonly kind: "full"; readonly reason: string };

/** Its chain is open from the question to the commit: what was checked is what is built on. */
interface PromisedBase {
  readonly kind: "base";
  readonly base: Point;
  readonly chain: OpenChain;
}

/** How a device is backed up now. */
type Decision =
  | { readonly mode: "incremental"; readonly base: Point; readonly chain: OpenChain }
  | { readonly mode: "full"; readonly reason: string };

/** Owned by the provider from backup_init to backup_cleanup. */
export class VmBackup implements AsyncDisposable {
  readonly vmid: number;
  readonly #environment: VmBackupEnvironment;
  readonly #owned: CleanupStack;
  readonly #lock: GuestLock;
  readonly #staged: StagedPoint;
  readonly #promised = new Map<string, Promised>();
  #baseLock: ChainLock | undefined;
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
    const answers = new Map<string, "new" | "use">();
    if (mode === "full") return answers;
    const guest = await readGuestIdentity(this.vmid, root);
    for (const [device, { size }] of volumes) {
      const decision = await store.decideBase({ vmid: this.vmid, device, sizeBytes: size, guest, signal });
      if (!decision.usable) {
        this.#promised.set(device, { kind: "full", reason: decision.reason });
        answers.set(device, "new");
        continue;
      }
      this.#owned.use(decision.chain);
      this.#promised.set(device, await this.#promise(decision, signal));
      answers.set(device, this.#promised.get(device)?.kind === "base" ? "use" : "new");
    }
    return answers;
  }

  /**
   * Holds the base until the commit, so that nobody removes it in between; all devices share one base. Its chain is
   * sound all the way down.
   */
  async #promise({ base, chain }: Omit<PromisedBase, "kind">, signal: AbortSignal): Promise<Promised> {
    try {
      this.#baseLock ??= this.#owned.use(await this.#environment.store.lockChainShared(base, signal, "required"));
      await this.#environment.store.assertChainSound(`build on "${base.volname}"`, this.vmid, chain, signal);
      await Qcow2Chain.over(openFiles(chain), signal); // what cannot be opened cannot be a base
      await chain.assertUnchanged("everything");
      return { kind: "base", base, chain };
    } catch (error) {
      signal.throwIfAborted();
      if (!(error instanceof HostError)) throw error;
      return { kind: "full", reason: `its base cannot be used: ${error.message}` };
    }
  }

  /**
   * Copies, checks and commits. When this returns, or when `point` is set, the backup is safe and stays.
   *
   * @throws BaseUnusableError if QEMU gives only what changed since a base that is gone meanwhile; LockedError if
   *   another host took this one for dead
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
      // Whoever broke our lock has swept our files too: what failed first is a missing file then.
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
    await this.#staged.writeFile(GUEST_CONFIG_FILE, guestConfig);
    if (info.firewallConfig !== undefined) await this.#staged.writeFile(FIREWALL_CONFIG_FILE, info.firewallConfig);
    using pool = new AlignedPool(READ_BYTES, POOL_SLOTS);
    const throttle = new Throttle(info.bandwidthLimit);
    const devices: StagedDevice[] = [];
    for (const [device, volume] of [...volumes].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const decision = await this.#decide(device, volume, guest, signal);
      log("info", describe(device, volume, decision));
      const job = { device, volume, decision, pool, throttle, signal };
      devices.push(
        await this.#backUpDevice(job).catch((error: unknown) => {
          throw explainLoss(this.vmid, device, error);
        }),
      );
    }
    await this.#baseLock?.assertHeld();
    const point = await this.#staged.commit({ devices, process: guest.process }, signal);
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

  /** The config that PVE backs up decides about the vmgenid, the node about the process. */
  async #guestIdentity(guestConfig: Buffer): Promise<GuestIdentity> {
    const vmgenid = parseVmgenid(guestConfig);
    const process = await readGuestProcess(this.vmid, this.#environment.root);
    return { ...(vmgenid === undefined ? {} : { vmgenid }), ...(process === undefined ? {} : { process }) };
  }

  async #decide(device: string, volume: VmVolume, guest: GuestIdentity, signal: AbortSignal): Promise<Decision> {
    const promised = this.#promised.get(device);
    if (volume.bitmapMode === "reuse") {
      if (promised?.kind !== "base") {
        throw new RequestError(`Cannot back up "${device}": PVE reuses a bitmap that this storage did not ask for`);
      }
      const question = { vmid: this.vmid, device, sizeBytes: volume.size, guest, signal };
      await this.#environment.store.recheckBase(question, promised);
      return { mode: "incremental", base: promised.base, chain: promised.chain };
    }
    if (this.#environment.mode === "full") return { mode: "full", reason: "vm-backup-mode is full" };
    if (promised === undefined) return { mode: "full", reason: "PVE did not ask for an incremental backup of it" };
    if (promised.kind === "full") return { mode: "full", reason: promised.reason };
    return { mode: "full", reason: "QEMU has no bitmap of it, or started a new one" };
  }

  async #backUpDevice(job: DeviceJob): Promise<StagedDevice> {
    const { compression, compressor, log } = this.#environment;
    const { decision, device, signal, volume } = job;
    await using stack = new CleanupStack();
    const source = stack.use(await this.#openSource(device, volume, signal));
    let base: Qcow2Chain | undefined;
    let backing: { file: string; format: "qcow2" } | undefined;
    if (decision.mode === "incremental") {
      base = await Qcow2Chain.over(openFiles(decision.chain), signal);
      backing = { file: backingFileName(decision.base.folderName, device), format: "qcow2" };
    }
    const file = this.#staged.newFile(deviceFileName(device));
    const target = stack.use(
      await Qcow2Writer.create({ file, virtualBytes: volume.size, backing, compression, compressor, signal }),
    );
    const copied = await copyDevice({
      device,
      source,
      target,
      base,
      pool: job.pool,
      throttle: job.throttle,
      log,
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
      ...(decision.mode === "incremental" ? { base: decision.base } : {}),
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
    if (calls === undefined) throw new RequestError(`Cannot back up "${device}": nobody tells its dirty regions`);
    return await FileHandleSource.open({ device, volume, handle, storeid, calls, timeouts, log }, signal);
  }
}

const openFiles = ({ images }: OpenChain): RegularFile[] => images.map(({ file }) => file);

interface DeviceJob {
  readonly device: string;
  readonly volume: VmVolume;
  readonly decision: Decision;
  readonly pool: AlignedPool;
  readonly throttle: Throttle;
  readonly signal: AbortSignal;
}

function describe(device: string, volume: VmVolume, decision: Decision): string {
  const size = formatBytes(volume.size);
  return decision.mode === "incremental"
    ? `${device}: incremental backup of ${size} since "${decision.base.volname}"`
    : `${device}: full backup of ${size} (${decision.reason})`;
}
