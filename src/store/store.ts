// SPDX-License-Identifier: AGPL-3.0-or-later
// The store: a plain directory of points. This class joins the modules; each rule lives in one of them.
import { isAbsolute, normalize } from "node:path";
import { messageOf, NotFoundError, orderedMap, quote, RequestError } from "../core/index.ts";
import { checkVmid, type PointType, parseArchiveName, STOREID_PATTERN, volnameOf } from "../pve/index.ts";
import { type Attributes, readAttributes, writeAttributes } from "./attributes.ts";
import { type BaseAnswer, type BaseQuestion, type ChainCheck, findBase } from "./base.ts";
import { type CatalogEntry, listGuests } from "./catalog.ts";
import type { OpenChain } from "./chain.ts";
import { openStoreFolder, type StoreContext } from "./context.ts";
import { type DurableIo, durableIo } from "./durable.ts";
import { StoreUnavailableError } from "./errors.ts";
import type { ManifestBase } from "./format/manifest.ts";
import { GuestPoints } from "./guest-points.ts";
import { HeldChains } from "./held-chains.ts";
import type { LockNeed } from "./lock/chain-lock.ts";
import { GuestLock } from "./lock/guest-lock.ts";
import { LOCK_TIMING, type LockTiming } from "./lock/lock-record.ts";
import { lockAttributes, lockPointExclusive } from "./lock/point-lock.ts";
import { keepFailedLog, storeLog } from "./logs.ts";
import { openPoint, openPointFolder, type Point } from "./point.ts";
import { assertSound } from "./sound-image.ts";
import { SoundMemory } from "./sound-memory.ts";
import { type BeginRequest, StagedPoint } from "./staged-point.ts";

interface StoreOptions {
  /** Absolute path of the store's directory; it must exist. */
  readonly path: string;
  readonly storeid: string;
  /** Prefix before /etc/pve, /run and /var/lib; empty on a real system. */
  readonly root: string;
  readonly nodename: string;
  /** Takes one line about a problem that stops no job: a damaged directory, a state file that was not written. */
  readonly warn?: (message: string) => void;
  readonly timing?: LockTiming;
  /** For tests: how bytes become durable. */
  readonly io?: DurableIo;
}

/** One row of a listing. */
export interface PointEntry {
  /** "<vmid>/<qemu|lxc>-<epoch>". */
  readonly archive: string;
  /** "backup/" and the archive name. */
  readonly volname: string;
  readonly vmid: number;
  readonly type: PointType;
  readonly epoch: number;
  readonly kind: "complete" | "legacy";
  /** Disk space that it takes, at least 1. */
  readonly occupiedBytes: number;
  /** Volume name of the base; undefined for full and for legacy points. */
  readonly parent: string | undefined;
  /** The base is missing, damaged, or another backup: this one cannot be restored. */
  readonly baseMissing: boolean;
  readonly uuid: string | undefined;
  readonly sequence: number | undefined;
  readonly storeid: string | undefined;
  readonly notes: string | undefined;
  readonly protected: boolean;
}

const OPEN_DEADLINE_MS = 10_000;
const ROWS_IN_FLIGHT = 16;

export class Store implements AsyncDisposable {
  readonly #context: StoreContext;
  /** The record of the guest that was last asked about. */
  #sound: SoundMemory | undefined;

  private constructor(context: StoreContext) {
    this.#context = context;
  }

  /**
   * @throws StoreUnavailableError if the path is missing, is not a directory, or does not answer in time;
   *   RequestError
   */
  static async open(options: StoreOptions): Promise<Store> {
    const { path, storeid, root, nodename, warn = () => undefined, timing = LOCK_TIMING, io = durableIo } = options;
    if (!isAbsolute(path)) throw new RequestError(`Cannot use storage path ${quote(path)}: expected an absolute path`);
    if (!STOREID_PATTERN.test(storeid)) throw new RequestError(`Cannot use storage id ${quote(storeid)}`);
    const folder = await withDeadline(path, openStoreFolder(normalize(path)));
    return new Store({ path: normalize(path), folder, storeid, root, nodename, io, timing, warn });
  }

  get path(): string {
    return this.#context.path;
  }

  /**
   * Complete and legacy points, of one guest or of all, by guest and name. Damaged directories cause a warning.
   *
   * @throws StoreUnavailableError; the reason of `signal`
   */
  async listPoints(filter: { readonly vmid?: number | undefined }, signal: AbortSignal): Promise<PointEntry[]> {
    const vmids = filter.vmid === undefined ? await listGuests(this.#context) : [checkVmid(filter.vmid)];
    const rows: PointEntry[] = [];
    for (const vmid of vmids) {
      const entries = await this.#scanOrWarn(vmid, filter.vmid === undefined, signal);
      for await (const row of orderedMap(entries, ROWS_IN_FLIGHT, (entry) => this.#row(entry, entries))) {
        signal.throwIfAborted();
        if (row !== undefined) rows.push(row);
      }
    }
    return rows;
  }

  /** @throws RequestError, NotFoundError, PointDamagedError, StoreUnavailableError */
  async openPoint(archive: string, signal: AbortSignal): Promise<Point> {
    signal.throwIfAborted();
    return await openPoint(this.#context, archive);
  }

  /** @throws LockedError naming the holder, and since when it holds the lock */
  async lockGuest(vmid: number, signal: AbortSignal): Promise<GuestLock> {
    return await GuestLock.acquire(this.#context, vmid, signal);
  }

  /** See StagedPoint.begin(). */
  async beginPoint(request: BeginRequest): Promise<StagedPoint> {
    return await StagedPoint.begin(this.#context, request);
  }

  /** See findBase() in base.ts. */
  async findBase(question: BaseQuestion, check: ChainCheck): Promise<BaseAnswer> {
    return await findBase(this.#context, question, check);
  }

  /** The points of a guest, for a reader of one of them: each is read once. The caller disposes it. */
  async pointsOf(vmid: number): Promise<GuestPoints> {
    return await GuestPoints.open(this.#context, vmid);
  }

  /**
   * Opens a point for reading: the chains of all devices, checked and locked.
   *
   * @param points of its guest; outlives what is returned
   * @param need "required" where reading without a lock will not do; "if possible" warns and goes on
   * @throws LockedError, PointDamagedError, NotFoundError, NewerFormatError, EnvironmentError
   */
  async holdChains(
    points: GuestPoints,
    archive: string,
    signal: AbortSignal,
    need: LockNeed = "if possible",
  ): Promise<HeldChains> {
    const point = await points.point(parseArchiveName(archive));
    return await HeldChains.open(this.#context, points, point, need, signal);
  }

  /**
   * Reads the tables of a chain that a backup is to build on, all the way down. Below the topmost image, those that
   * have not changed since they were last read count as they did then.
   *
   * @throws as assertSound()
   */
  async assertChainSound(act: string, vmid: number, { images }: OpenChain, signal: AbortSignal): Promise<void> {
    const memory = this.#sound?.vmid === vmid ? this.#sound : await SoundMemory.load(this.#context, vmid);
    this.#sound = memory;
    for (const [depth, { file, header, stamp }] of images.entries()) {
      if (depth > 0 && memory.has(stamp)) continue;
      await assertSound(act, file, signal, header);
      memory.add(stamp);
    }
    await memory.save();
  }

  /** Remover's lock on one point. @throws LockedError while it is being read */
  async lockPointExclusive(point: Point, signal: AbortSignal): Promise<AsyncDisposable> {
    return await lockPointExclusive(this.#context, point, signal);
  }

  async readAttributes(archive: string, signal: AbortSignal): Promise<Attributes> {
    const point = await this.openPoint(archive, signal);
    await using folder = await openPointFolder(this.#context, point);
    return await readAttributes(folder, this.#context.warn);
  }

  /** Changes the given attributes and keeps the others; notes of "" are removed. */
  async updateAttributes(archive: string, change: Partial<Attributes>, signal: AbortSignal): Promise<void> {
    const point = await this.openPoint(archive, signal);
    await using _lock = await lockAttributes(this.#context, point, signal);
    await using folder = await openPointFolder(this.#context, point);
    const { notes, ...rest } = { ...(await readAttributes(folder, this.#context.warn)), ...change };
    const attributes = notes === undefined || notes === "" ? rest : { ...rest, notes };
    await writeAttributes(folder, attributes, this.#context.io);
  }

  /** Copies a task log beside a point, bounded in size. */
  async storeLog(point: Point, path: string): Promise<void> {
    await storeLog(this.#context, point, path);
  }

  /** Keeps the task log of a failed job, bounded in size, count and time. */
  async keepFailedLog(
    job: { readonly vmid: number; readonly type: PointType; readonly epoch: number },
    path: string,
  ): Promise<void> {
    await keepFailedLog(this.#context, job, path);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#context.folder[Symbol.asyncDispose]();
  }

  async #scanOrWarn(vmid: number, isOneOfMany: boolean, signal: AbortSignal): Promise<CatalogEntry[]> {
    try {
      await using points = await GuestPoints.open(this.#context, vmid);
      return await points.all(signal);
    } catch (error) {
      signal.throwIfAborted();
      if (!isOneOfMany || error instanceof StoreUnavailableError) throw error;
      this.#context.warn(messageOf(error));
      return [];
    }
  }

  /** Undefined for a point that has disappeared since it was listed. */
  async #attributesOf(entry: Exclude<CatalogEntry, { kind: "damaged" }>): Promise<Attributes | undefined> {
    if (!entry.hasAttributes) return { protected: false };
    try {
      await using folder = await openPointFolder(this.#context, entry.name);
      return await readAttributes(folder, this.#context.warn);
    } catch (error) {
      if (!(error instanceof NotFoundError)) this.#context.warn(messageOf(error));
      return undefined;
    }
  }

  async #row(entry: CatalogEntry, all: readonly CatalogEntry[]): Promise<PointEntry | undefined> {
    const { archive, vmid, type, epoch } = entry.name;
    if (entry.kind === "damaged") {
      const what = `backup "${volnameOf(archive)}": ${entry.reason}`;
      this.#context.warn(entry.unreadable === undefined ? `Skipping damaged ${what}` : `Skipping unreadable ${what}`);
      return undefined;
    }
    const attributes = await this.#attributesOf(entry);
    if (attributes === undefined) return undefined;
    const manifest = entry.kind === "complete" ? entry.manifest : undefined;
    const base = manifest?.devices.find((device) => device.base !== undefined)?.base;
    return {
      archive,
      volname: volnameOf(archive),
      vmid,
      type,
      epoch,
      kind: entry.kind,
      occupiedBytes: entry.occupiedBytes,
      parent: base === undefined ? undefined : volnameOf(`${vmid}/${base.folder}`),
      baseMissing: base !== undefined && !all.some((one) => isPoint(one, base)),
      uuid: manifest?.uuid,
      sequence: manifest?.sequence,
      storeid: manifest?.storeid,
      notes: attributes.notes,
      protected: attributes.protected,
    };
  }
}

function isPoint(entry: CatalogEntry, { folder, uuid }: ManifestBase): boolean {
  if (entry.name.folderName !== folder) return false;
  return entry.kind === "complete" && entry.manifest.uuid === uuid;
}

/** A hung network share blocks a thread forever; the caller gets an error after a while. */
async function withDeadline<T extends AsyncDisposable>(path: string, work: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  let isLate = false;
  const deadline = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => {
      isLate = true;
      const seconds = OPEN_DEADLINE_MS / 1000;
      reject(new StoreUnavailableError(`Cannot use storage path "${path}": it did not answer within ${seconds} s`));
    }, OPEN_DEADLINE_MS);
  });
  work.then((late) => (isLate ? late[Symbol.asyncDispose]() : undefined)).catch(() => undefined); // told by the race
  try {
    return await Promise.race([work, deadline]);
  } finally {
    clearTimeout(timer);
  }
}
