// SPDX-License-Identifier: AGPL-3.0-or-later
// What a backup builds on: the newest point of a guest, if it is sound. QEMU's bitmaps are trusted only if both
// witnesses, the one outside the store and the store's own, agree with the store. Any doubt makes the backup read
// everything and compare it with the digests of that point, or store all of it where there are none.
import { CleanupStack, formatBytes, HostError } from "../core/index.ts";
import { checkDeviceName, checkVmid, type GuestIdentity } from "../pve/index.ts";
import { checkForeign, judge, judgeAll, NotUsable, newestOf, type Verdict } from "./base-verdict.ts";
import type { CatalogEntry, CompleteEntry } from "./catalog.ts";
import { MAX_CHAIN_LENGTH, type OpenChain, openChain } from "./chain.ts";
import type { StoreContext } from "./context.ts";
import { BaseUnusableError } from "./errors.ts";
import { HeldChains } from "./held-chains.ts";
import type { Unchanged } from "./image-file.ts";
import { completePoint, type Point } from "./point.ts";
import { type GuestSnapshot, readMemories, takeSnapshot } from "./snapshot.ts";
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

/** The base was usable when the question was asked, and no longer is. */
class Changed extends Error {}

/** The newest point of a guest as the base of a backup: held from the decision to the commit. */
export class Base implements AsyncDisposable {
  readonly point: Point;
  /** The chains of the devices that can build on it. */
  readonly chains: ReadonlyMap<string, OpenChain>;
  /** Why QEMU's bitmaps do not tell what changed since it: everything must be read. Undefined if they do. */
  readonly distrust: string | undefined;
  readonly #context: StoreContext;
  readonly #snapshot: GuestSnapshot;
  readonly #held: HeldChains;
  readonly #owned: CleanupStack;

  constructor(
    context: StoreContext,
    { snapshot, held, distrust }: { snapshot: GuestSnapshot; held: HeldChains; distrust: string | undefined },
    owned: CleanupStack,
  ) {
    this.distrust = distrust;
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
    const { uuid, volname } = this.point;
    await insist(`Cannot build on "${volname}": it is no longer usable as a base`, signal, async () => {
      const { newest } = await this.#judgeAgain(guest, signal);
      if (newest.manifest.uuid !== uuid) throw new Changed("a newer backup took its place");
      await this.#held.assertHeld();
      await this.#assertUntouched("everything");
    });
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
   * @throws BaseUnusableError, LockedError; the reason of `signal`
   */
  async assertCommittable(now: GuestSnapshot, signal: AbortSignal): Promise<void> {
    await this.#held.assertHeld();
    const sentence = `Cannot commit the backup: its base "${this.point.volname}" is no longer usable`;
    await insist(sentence, signal, async () => {
      for (const { folderName } of this.#held.names) {
        const before = uuidOf(await this.#snapshot.points.entryOf(folderName));
        const entry = await now.points.entryOf(folderName);
        if (entry === undefined) throw new Changed(`${folderName} is missing`);
        if (entry.kind === "damaged") throw new Changed(`${folderName} is damaged: ${entry.reason}`);
        if (before === undefined || uuidOf(entry) !== before) throw new Changed(`${folderName} is another backup now`);
      }
      await this.#assertUntouched("content");
    });
  }

  async #assertUntouched(what: Unchanged): Promise<void> {
    await this.#held.assertInPlace();
    for (const chain of this.chains.values()) await chain.assertUnchanged(what);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

/** @throws BaseUnusableError saying `sentence`, and why, if `work` finds that the base cannot be used any more */
async function insist(sentence: string, signal: AbortSignal, work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (error) {
    signal.throwIfAborted();
    if (!(error instanceof NotUsable || error instanceof Changed || error instanceof HostError)) throw error;
    throw new BaseUnusableError(`${sentence}: ${error.message}`, {
      cause: error,
      hint: "nothing is lost: the next backup reads everything",
    });
  }
}

const uuidOf = (entry: CatalogEntry | undefined): string | undefined =>
  entry?.kind === "complete" ? entry.manifest.uuid : undefined;

export interface BaseAnswer {
  /** The caller disposes it; undefined if no device can build on anything. */
  readonly base: Base | undefined;
  /** Why each device that the base has no chain for is backed up in full. Ends the line "full backup of ...". */
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
    const { newest, record, ...judged } = choose(context, snapshot, guest);
    const point = completePoint(context, newest.name, newest.manifest, newest.occupiedBytes);
    const chains = new Map<string, OpenChain>();
    for (const [device, { size }] of devices) {
      const chain = await openBaseChain(snapshot, point, device, size, signal).catch(toReason);
      if (typeof chain === "string") reasons.set(device, chain);
      else chains.set(device, owned.use(chain));
    }
    if (chains.size === 0) return { base: undefined, reasons };
    const distrust = judged.distrust ?? reasonOf(() => checkForeign(snapshot.entries, record));
    if (distrust !== undefined) refuseWithoutDigests(chains, reasons, distrust);
    if (chains.size === 0) return { base: undefined, reasons };
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
    if (chains.size === 0) return { base: undefined, reasons };
    return { base: new Base(context, { snapshot, held, distrust }, owned.move()), reasons };
  } catch (error) {
    signal.throwIfAborted();
    const reason = toReason(unusable(error));
    for (const device of devices.keys()) reasons.set(device, reasons.get(device) ?? reason);
    return { base: undefined, reasons };
  }
}

interface Choice {
  readonly newest: CompleteEntry;
  readonly record: WitnessRecord | undefined;
  readonly distrust: string | undefined;
}

/** The newest point, and whether the bitmaps began with it. @throws NotUsable if there is nothing to build on */
function choose(context: StoreContext, snapshot: GuestSnapshot, guest: GuestIdentity): Choice {
  try {
    return { ...judge(context, snapshot.entries, snapshot, guest), distrust: undefined };
  } catch (error) {
    const newest = newestOf(context, snapshot.entries);
    if (!(error instanceof NotUsable) || newest === undefined) throw error;
    return { newest, record: undefined, distrust: error.message };
  }
}

/** What cannot be compared is stored in full. */
function refuseWithoutDigests(chains: Map<string, OpenChain>, reasons: Map<string, string>, distrust: string): void {
  for (const [device, chain] of chains) {
    if (chain.hasDigests) continue;
    reasons.set(device, distrust);
    chains.delete(device);
  }
}

function reasonOf(check: () => void): string | undefined {
  try {
    check();
    return undefined;
  } catch (error) {
    return toReason(error);
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
