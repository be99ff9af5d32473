// SPDX-License-Identifier: AGPL-3.0-or-later
// One VM backup: from the question which disks may be incremental, to the committed point.
import { AlignedPool, POOL_SLOTS, READ_BYTES, Throttle } from "../block/index.ts";
import { CleanupStack, formatBytes, messageOf, RequestError } from "../core/index.ts";
import type { Digest } from "../digest/index.ts";
import type { VmBackupInfo, VmVolume } from "../provider/index.ts";
import {
  checkDeviceName,
  type GuestIdentity,
  parseVmgenid,
  readGuestIdentity,
  readGuestProcess,
} from "../pve/index.ts";
import { Qcow2Chain } from "../qcow2/index.ts";
import { explainLoss } from "../source/index.ts";
import {
  type Base,
  FIREWALL_CONFIG_FILE,
  GUEST_CONFIG_FILE,
  type GuestLock,
  type OpenChain,
  type Point,
  type StagedDevice,
  type StagedPoint,
  type Store,
} from "../store/index.ts";
import { backUpDevice, type Decision, type DeviceEnvironment } from "./device-backup.ts";

interface VmBackupEnvironment extends DeviceEnvironment {
  readonly store: Store;
  readonly root: string;
  readonly mode: "full" | "incremental";
  /** After so many days everything is read, and compared, once more; 0: never. */
  readonly fullReadEveryDays: number;
}

const DAY_SECONDS = 86_400;

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
  /** Why devices are read in full although their bitmap can be trusted. */
  readonly #due = new Map<string, { readonly readAll: string }>();
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

  /** Rule: nothing in mode full; per device "use" where its bitmap tells what changed since the base, else "new". */
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
    this.#due.clear();
    const guest = await readGuestIdentity(this.vmid, root);
    const check = (base: Point, device: string, chain: OpenChain) => this.#check(base, device, chain, signal);
    const { base, reasons } = await store.findBase({ vmid: this.vmid, devices: volumes, guest, signal }, check);
    if (base !== undefined) this.#base = this.#owned.use(base);
    this.#reasons = reasons;
    if (base !== undefined && base.distrust === undefined) this.#findDue(base);
    const canUse = (device: string): boolean =>
      base?.distrust === undefined && base?.chains.has(device) === true && !this.#due.has(device);
    return new Map([...volumes.keys()].map((device) => [device, canUse(device) ? "use" : "new"]));
  }

  /** A bitmap that lies is found only by reading everything; without digests that would cost a full image. */
  #findDue(base: Base): void {
    const days = this.#environment.fullReadEveryDays;
    if (days === 0) return;
    for (const [device, { hasDigests, lastReadAll }] of base.chains) {
      if (!hasDigests || lastReadAll === undefined) continue;
      const age = Math.floor((this.#staged.name.epoch - lastReadAll) / DAY_SECONDS);
      if (age >= days)
        this.#due.set(device, { readAll: `all of it was last read ${age} days ago, see dir-full-read-every` });
    }
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
    const digests = new Map<string, Digest>();
    for (const [device, volume] of [...volumes].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const decision = this.#decide(device, volume);
      const job = { device, volume, decision, pool, throttle, staged: this.#staged, signal };
      const done = await backUpDevice(this.#environment, job).catch((error: unknown) => {
        throw explainLoss(this.vmid, device, error);
      });
      devices.push(done.image);
      if (done.digests !== undefined) digests.set(done.digests.name, done.digests.digest);
    }
    const parts = { devices, base: this.#base, process: guest.process, digests };
    const point = await this.#staged.commit(parts, signal);
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
    const base = this.#base?.point;
    const chain = this.#readers.get(device);
    const open = this.#base?.chains.get(device);
    const isHeld = base !== undefined && chain !== undefined && open !== undefined;
    if (bitmapMode === "reuse") {
      if (!isHeld || this.#base?.distrust !== undefined || this.#due.has(device)) {
        throw new RequestError(`Cannot back up "${device}": PVE reuses a bitmap that this storage did not ask for`);
      }
      return { mode: "incremental", base, chain, open, readAll: undefined };
    }
    if (this.#environment.mode === "full") return { mode: "full", reason: "vm-backup-mode is full" };
    if (isHeld && open.hasDigests) {
      const due = this.#due.get(device);
      const readAll = due?.readAll ?? this.#base?.distrust ?? "QEMU has no bitmap of it, or started a new one";
      return { mode: "incremental", base, chain, open, readAll };
    }
    if (isHeld) return { mode: "full", reason: "QEMU has no bitmap of it, or started a new one" };
    const reason = this.#reasons.get(device);
    if (reason === undefined) return { mode: "full", reason: "PVE did not ask for an incremental backup of it" };
    return { mode: "full", reason };
  }
}

/** The default is that of the upstream example: an administrator who expects increments must be told. */
const FULL_MODE_HINT =
  'backing up in full: set "vm-backup-mode incremental" for this storage in storage.cfg to back up only what changed';
