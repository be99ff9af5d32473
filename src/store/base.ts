// SPDX-License-Identifier: AGPL-3.0-or-later
// Full or incremental: decides whether a backup may build on the newest point of a guest. Both witnesses, the one
// outside the store and the store's own, must agree with the store. Any doubt makes the backup a full one, and the
// log says why.
import { CleanupStack, formatBytes, HostError } from "../core/index.ts";
import { isSameProcess } from "../host/index.ts";
import { checkDeviceName, checkVmid, type GuestIdentity } from "../pve/index.ts";
import type { CatalogEntry, CompleteEntry } from "./catalog.ts";
import { MAX_CHAIN_LENGTH, type OpenChain, openChain } from "./chain.ts";
import type { StoreContext } from "./context.ts";
import { BaseUnusableError } from "./errors.ts";
import { HeldChains } from "./held-chains.ts";
import { completePoint, type Point } from "./point.ts";
import { type GuestSnapshot, type Memories, readMemories, takeSnapshot } from "./snapshot.ts";
import type { WitnessRecord } from "./witness.ts";

export interface BaseQuestion {
  readonly vmid: number;
  /** Sizes of the devices in bytes. */
  readonly devices: ReadonlyMap<string, { readonly size: number }>;
  /** The guest as it is now. */
  readonly guest: GuestIdentity;
  readonly signal: AbortSignal;
}

/**
 * Checks the chain of one device more closely, before anything is promised; throws a HostError if it cannot be used.
 */
export type ChainCheck = (base: Point, device: string, chain: OpenChain) => Promise<void>;

class NotUsable extends Error {}
/** The base was usable when the question was asked, and no longer is. */
class Changed extends Error {}

const NOTHING_LOST = { hint: "nothing is lost: the next backup is a full one" };

/** The newest point of a guest as the base of a backup: held from the decision to the commit. */
export class Base implements AsyncDisposable {
  readonly point: Point;
  /** The chains of the devices that can build on it. */
  readonly chains: ReadonlyMap<string, OpenChain>;
  readonly #context: StoreContext;
  readonly #snapshot: GuestSnapshot;
  readonly #held: HeldChains;
  readonly #owned: CleanupStack;

  constructor(context: StoreContext, snapshot: GuestSnapshot, held: HeldChains, owned: CleanupStack) {
    this.point = held.point;
    this.chains = held.chains;
    this.#context = context;
    this.#snapshot = snapshot;
    this.#held = held;
    this.#owned = owned;
  }

  /**
   * Asks the same question at the moment of use: checks the witnesses, the names and the open files again. Manifests
   * and headers are read again only if a point has come or gone.
   *
   * @param guest as it is backed up
   * @throws BaseUnusableError if the answer has changed
   */
  async recheck(guest: GuestIdentity, signal: AbortSignal): Promise<void> {
    try {
      const { newest } = await this.#judgeAgain(guest, signal);
      if (newest.manifest.uuid !== this.point.uuid) throw new Changed("a newer backup took its place");
      await this.#held.assertHeld();
      await this.#held.assertInPlace();
      for (const chain of this.chains.values()) await chain.assertUnchanged("everything");
    } catch (error) {
      signal.throwIfAborted();
      if (!(error instanceof NotUsable || error instanceof Changed || error instanceof HostError)) throw error;
      const { volname } = this.point;
      throw new BaseUnusableError(`Cannot build on "${volname}": it is no longer usable as a base: ${error.message}`, {
        cause: error,
        ...NOTHING_LOST,
      });
    }
  }

  async #judgeAgain(guest: GuestIdentity, signal: AbortSignal): Promise<Verdict> {
    const { points, entries } = this.#snapshot;
    const names = (await points.names()).map(({ folderName }) => folderName);
    const isSame = names.join() === entries.map(({ name }) => name.folderName).join();
    if (isSame) return judgeAll(this.#context, entries, await readMemories(this.#context, points), guest);
    await using now = await takeSnapshot(this.#context, points.vmid, signal);
    return judgeAll(this.#context, now.entries, now, guest);
  }

  /**
   * Before the commit: checks that each point of the chains is still the recorded one and each open file still has
   * its name.
   *
   * @param now taken after the copy
   * @throws BaseUnusableError, LockedError
   */
  async assertCommittable(now: GuestSnapshot): Promise<void> {
    await this.#held.assertHeld();
    try {
      for (const { folderName } of this.#held.names) {
        const before = uuidOf(await this.#snapshot.points.entryOf(folderName));
        const entry = await now.points.entryOf(folderName);
        if (entry === undefined) throw new Changed(`${folderName} is missing`);
        if (entry.kind === "damaged") throw new Changed(`${folderName} is damaged: ${entry.reason}`);
        if (before === undefined || uuidOf(entry) !== before) throw new Changed(`${folderName} is another backup now`);
      }
      await this.#held.assertInPlace();
      for (const chain of this.chains.values()) await chain.assertUnchanged("content");
    } catch (error) {
      if (!(error instanceof Changed || error instanceof HostError)) throw error;
      const { volname } = this.point;
      throw new BaseUnusableError(
        `Cannot commit the backup: its base "${volname}" is no longer usable: ${error.message}`,
        {
          cause: error,
          ...NOTHING_LOST,
        },
      );
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

const uuidOf = (entry: CatalogEntry | undefined): string | undefined =>
  entry?.kind === "complete" ? entry.manifest.uuid : undefined;

export interface BaseAnswer {
  /** The caller disposes it; undefined if no device can build on anything. */
  readonly base: Base | undefined;
  /** Why each device that the base has no chain for is backed up in full. Ends the line "full backup: ...". */
  readonly reasons: ReadonlyMap<string, string>;
}

/**
 * Decides for all devices of a guest at once. The caller holds the guest's lock.
 *
 * @throws only what is not a reason for a full backup: RequestError, StoreUnavailableError, the reason of `signal`
 */
export async function findBase(context: StoreContext, question: BaseQuestion, check: ChainCheck): Promise<BaseAnswer> {
  const { vmid, devices, guest, signal } = question;
  checkVmid(vmid);
  for (const device of devices.keys()) checkDeviceName(device);
  await using owned = new CleanupStack();
  const reasons = new Map<string, string>();
  const snapshot = owned.use(await takeSnapshot(context, vmid, signal));
  try {
    const { newest, record } = judge(context, snapshot.entries, snapshot, guest);
    const point = completePoint(context, newest.name, newest.manifest, newest.occupiedBytes);
    const chains = new Map<string, OpenChain>();
    for (const [device, { size }] of devices) {
      const chain = await openBaseChain(snapshot, point, device, size, signal).catch(toReason);
      if (typeof chain === "string") reasons.set(device, chain);
      else chains.set(device, owned.use(chain));
    }
    if (chains.size === 0) return { base: undefined, reasons };
    checkForeign(snapshot.entries, record);
    const held = owned.use(await HeldChains.hold(context, snapshot.points, point, chains, "required", signal));
    for (const [device, chain] of chains) {
      const reason = await check(point, device, chain).then(
        () => undefined,
        (error) => toReason(unusable(error)),
      );
      if (reason === undefined) continue;
      signal.throwIfAborted();
      reasons.set(device, reason);
      chains.delete(device);
    }
    return { base: chains.size === 0 ? undefined : new Base(context, snapshot, held, owned.move()), reasons };
  } catch (error) {
    signal.throwIfAborted();
    const reason = toReason(unusable(error));
    for (const device of devices.keys()) reasons.set(device, reasons.get(device) ?? reason);
    return { base: undefined, reasons };
  }
}

/** A problem with the base is a reason for a full backup, never for no backup. */
function unusable(error: unknown): unknown {
  return error instanceof HostError ? new NotUsable(`its base cannot be used: ${error.message}`) : error;
}

/** What keeps one device from building on its base; everything else is rethrown. */
function toReason(error: unknown): string {
  if (error instanceof NotUsable || error instanceof HostError) return error.message;
  throw error;
}

interface Verdict {
  readonly newest: CompleteEntry;
  readonly record: WitnessRecord;
}

/** The newest point of this storage, if everything that must agree on it does. @throws NotUsable */
function judge(
  { storeid }: StoreContext,
  entries: readonly CatalogEntry[],
  { witness, state }: Memories,
  guest: GuestIdentity,
): Verdict {
  const record = checkWitness(witness, entries, storeid);
  const newest = checkNewest(entries, record, storeid);
  checkState(state, newest, storeid);
  checkGuest(newest.manifest.guest, guest);
  checkGuest(record.guest, guest);
  return { newest, record };
}

/** The same, provided that no other directory appeared that might hold a newer one. @throws NotUsable */
function judgeAll(...asked: Parameters<typeof judge>): Verdict {
  const verdict = judge(...asked);
  checkForeign(asked[1], verdict.record);
  return verdict;
}

/** Complete points of this storage id: only these say anything about its bitmap. */
function ownPoints(entries: readonly CatalogEntry[], storeid: string): CompleteEntry[] {
  return entries.filter((entry) => entry.kind === "complete").filter((entry) => entry.manifest.storeid === storeid);
}

function checkWitness(state: Memories["witness"], entries: readonly CatalogEntry[], storeid: string): WitnessRecord {
  if (state.kind === "damaged") throw new NotUsable(`the record of the last backup is damaged: ${state.reason}`);
  if (state.kind === "none") {
    if (ownPoints(entries, storeid).length === 0) throw new NotUsable("first backup");
    throw new NotUsable("there is no record here of a last backup through this storage");
  }
  if (state.record.inFlight !== undefined) throw new NotUsable("the last backup was interrupted during its commit");
  if (state.record.settled === undefined) throw new NotUsable("first backup");
  return state.record;
}

function checkNewest(entries: readonly CatalogEntry[], record: WitnessRecord, storeid: string): CompleteEntry {
  const own = ownPoints(entries, storeid);
  const settled = own.find((entry) => entry.manifest.uuid === record.settled);
  if (settled === undefined) {
    const damaged = entries.find(
      (entry) => entry.kind === "damaged" && !record.foreign.includes(entry.name.folderName),
    );
    const detail = damaged?.kind === "damaged" ? ` (${damaged.name.folderName} is damaged: ${damaged.reason})` : "";
    throw new NotUsable(`the last backup through this storage is not here${detail}`);
  }
  // Equal sequences come from two writers that did not see each other: neither is certainly the newest.
  const rival = own.find((entry) => entry !== settled && entry.manifest.sequence >= settled.manifest.sequence);
  if (rival !== undefined)
    throw new NotUsable(`${rival.name.folderName} was made through this storage since, and is not recorded here`);
  return settled;
}

/** Compares names with the list at the last commit; no clock is involved. */
function checkForeign(entries: readonly CatalogEntry[], record: WitnessRecord): void {
  for (const entry of entries) {
    if (entry.kind === "complete" || record.foreign.includes(entry.name.folderName)) continue;
    if (entry.kind === "damaged") {
      throw new NotUsable(`directory ${entry.name.folderName} is damaged: ${entry.reason}`);
    }
    throw new NotUsable(`an unknown directory ${entry.name.folderName} appeared`);
  }
}

function checkGuest(then: GuestIdentity, now: GuestIdentity): void {
  if (then.vmgenid !== undefined || now.vmgenid !== undefined) {
    if (then.vmgenid === now.vmgenid) return;
    const what = then.vmgenid === undefined ? "appeared" : now.vmgenid === undefined ? "is gone" : "changed (rollback)";
    throw new NotUsable(`vmgenid ${what}`);
  }
  if (then.process === undefined || now.process === undefined) {
    throw new NotUsable("no vmgenid, and the QEMU process is not known");
  }
  if (!isSameProcess(then.process, now.process)) throw new NotUsable("no vmgenid and QEMU was restarted");
}

/** The third witness: restoring an old copy of the one outside does not take it back. */
function checkState(found: Memories["state"], newest: CompleteEntry, storeid: string): void {
  if (found.kind === "none") throw new NotUsable("state.json is missing, which names the last backup");
  if (found.kind === "damaged") {
    throw new NotUsable(`state.json cannot be used, which names the last backup: ${found.reason}`);
  }
  const last = found.state.newest.get(storeid);
  if (last?.uuid === newest.manifest.uuid) return;
  if (last === undefined) throw new NotUsable("state.json names no last backup through this storage");
  throw new NotUsable(`state.json names ${last.archive} as the last backup through this storage`);
}

async function openBaseChain(
  { points }: GuestSnapshot,
  base: Point,
  device: string,
  sizeBytes: number,
  signal: AbortSignal,
): Promise<OpenChain> {
  const found = base.type === "qemu" ? base.devices.get(device) : undefined;
  if (found === undefined) throw new NotUsable("it is not part of the last backup");
  if (found.virtualBytes !== sizeBytes) {
    throw new NotUsable(`size changed from ${sizeText(found.virtualBytes)} to ${sizeText(sizeBytes)}`);
  }
  const chain = await openChain(points, base, device, signal).catch((error: unknown) => {
    signal.throwIfAborted();
    if (error instanceof HostError) throw new NotUsable(`base damaged: ${error.message}`);
    throw error;
  });
  if (chain.images.length < MAX_CHAIN_LENGTH) return chain;
  await chain[Symbol.asyncDispose]();
  throw new NotUsable(`its chain already has ${chain.images.length} images`);
}

/** Exact where rounding would hide a difference. */
function sizeText(bytes: number): string {
  return bytes % (1024 * 1024) === 0 ? formatBytes(bytes) : `${bytes} B`;
}

/** Directories that were not complete points: the witness of a commit remembers them. */
export function foreignFolders(entries: readonly CatalogEntry[]): string[] {
  return entries.filter((entry) => entry.kind !== "complete").map((entry) => entry.name.folderName);
}
