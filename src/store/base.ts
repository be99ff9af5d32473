// SPDX-License-Identifier: AGPL-3.0-or-later
// Full or incremental: whether the newest point of a guest may be built on. The witnesses must agree with
// the store, the one outside it and what it remembers itself; everything doubtful makes a full backup, and says why.
import { CleanupStack, formatBytes, HostError } from "../core/index.ts";
import { isSameProcess } from "../host/index.ts";
import type { GuestIdentity } from "../pve/index.ts";
import { checkDeviceName, checkVmid } from "../pve/index.ts";
import { type CatalogEntry, type CompleteEntry, openGuest, scanGuest } from "./catalog.ts";
import { MAX_CHAIN_LENGTH, type OpenChain, openChain } from "./chain.ts";
import type { StoreContext } from "./context.ts";
import { BaseUnusableError } from "./errors.ts";
import { completePoint, type Point } from "./point.ts";
import { type FoundState, readState } from "./state.ts";
import { Witness, type WitnessRecord, type WitnessState } from "./witness.ts";

export interface BaseQuestion {
  readonly vmid: number;
  readonly device: string;
  readonly sizeBytes: number;
  /** The guest as it is now. */
  readonly guest: GuestIdentity;
  readonly signal: AbortSignal;
}

export type BaseDecision =
  /** `chain` is open, and the caller's to close. */
  | { readonly usable: true; readonly base: Point; readonly chain: OpenChain }
  /** `reason` ends the log line "full backup: ...". */
  | { readonly usable: false; readonly reason: string };

class NotUsable extends Error {}

/**
 * Decides for one device. The caller holds the guest's lock.
 *
 * @throws only what is no reason for a full backup: RequestError, StoreUnavailableError, the reason of `signal`
 */
export async function decideBase(context: StoreContext, question: BaseQuestion): Promise<BaseDecision> {
  checkVmid(question.vmid);
  checkDeviceName(question.device);
  try {
    const entries = await scanGuest(context, question.vmid, question.signal);
    const record = checkWitness(await readWitness(context, question.vmid), entries, context.storeid);
    const newest = checkNewest(entries, record, context.storeid);
    checkState(await readGuestState(context, question.vmid), newest, context.storeid);
    checkGuest(newest.manifest.guest, question.guest);
    checkGuest(record.guest, question.guest);
    const base = completePoint(context, newest.name, newest.manifest, newest.occupiedBytes);
    await using owned = new CleanupStack();
    const chain = owned.use(await openBaseChain(context, base, question));
    checkForeign(entries, record);
    owned.move();
    return { usable: true, base, chain };
  } catch (error) {
    if (error instanceof NotUsable) return { usable: false, reason: error.message };
    throw error;
  }
}

/**
 * The same question at the moment of use, for a base that was promised before.
 *
 * @throws BaseUnusableError if the answer is another one now
 */
export async function recheckBase(
  context: StoreContext,
  question: BaseQuestion,
  promised: { readonly base: Point; readonly chain: OpenChain },
): Promise<void> {
  const decision = await decideBase(context, question);
  const reason = decision.usable ? "a newer backup took its place" : decision.reason;
  await using _chain = decision.usable ? decision.chain : undefined;
  if (decision.usable && decision.base.uuid === promised.base.uuid) {
    promised.chain.assertSame(decision.chain);
    return;
  }
  throw new BaseUnusableError(
    `Cannot back up ${question.device} incrementally: its base is no longer usable (${reason})`,
    { hint: "nothing is lost: the next backup is a full one" },
  );
}

/** Complete points of this storage id: only they say something about its bitmap. */
function ownPoints(entries: readonly CatalogEntry[], storeid: string): CompleteEntry[] {
  return entries.filter((entry) => entry.kind === "complete").filter((entry) => entry.manifest.storeid === storeid);
}

async function readWitness(context: StoreContext, vmid: number): Promise<WitnessState> {
  try {
    const witness = await Witness.locate(context.root, context.storeid, vmid, context.io);
    return await witness.read();
  } catch (error) {
    if (error instanceof HostError) return { kind: "damaged", reason: error.message };
    throw error;
  }
}

function checkWitness(state: WitnessState, entries: readonly CatalogEntry[], storeid: string): WitnessRecord {
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
  // Equal sequences come from two writers that did not see each other: neither is the newest for sure.
  const rival = own.find((entry) => entry !== settled && entry.manifest.sequence >= settled.manifest.sequence);
  if (rival !== undefined) throw new NotUsable(`${rival.name.folderName} was made by somebody else since`);
  return settled;
}

/** By name against the list at the last commit, never by clocks. */
function checkForeign(entries: readonly CatalogEntry[], record: WitnessRecord): void {
  for (const entry of entries) {
    if (entry.kind === "complete" || record.foreign.includes(entry.name.folderName)) continue;
    if (entry.kind === "damaged") {
      throw new NotUsable(`folder ${entry.name.folderName} is damaged: ${entry.reason}`);
    }
    throw new NotUsable(`an unknown folder ${entry.name.folderName} appeared`);
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

/** The third witness, which no copy of the one outside can bring back to an older state. */
function checkState(found: FoundState, newest: CompleteEntry, storeid: string): void {
  if (found.kind === "none") throw new NotUsable("state.json is missing, which names the last backup");
  if (found.kind === "damaged") {
    throw new NotUsable(`state.json cannot be used, which names the last backup: ${found.reason}`);
  }
  const last = found.state.newest.get(storeid);
  if (last?.uuid === newest.manifest.uuid) return;
  if (last === undefined) throw new NotUsable("state.json names no last backup through this storage");
  throw new NotUsable(`state.json names ${last.archive} as the last backup through this storage`);
}

async function readGuestState(context: StoreContext, vmid: number): Promise<FoundState> {
  await using guest = await openGuest(context, vmid);
  return guest === undefined ? { kind: "none" } : await readState(guest);
}

async function openBaseChain(context: StoreContext, base: Point, question: BaseQuestion): Promise<OpenChain> {
  const { device, sizeBytes, signal } = question;
  const found = base.type === "qemu" ? base.devices.get(device) : undefined;
  if (found === undefined) throw new NotUsable("it is not part of the last backup");
  if (found.virtualBytes !== sizeBytes) {
    throw new NotUsable(`size changed from ${sizeText(found.virtualBytes)} to ${sizeText(sizeBytes)}`);
  }
  const chain = await openChain(context, base, device, signal).catch((error: unknown) => {
    signal.throwIfAborted();
    if (error instanceof HostError) throw new NotUsable(`base damaged: ${error.message}`);
    throw error;
  });
  if (chain.images.length < MAX_CHAIN_LENGTH) return chain;
  await chain[Symbol.asyncDispose]();
  throw new NotUsable(`its chain has ${chain.images.length} images already`);
}

/** Exact where rounding would hide a difference. */
function sizeText(bytes: number): string {
  return bytes % (1024 * 1024) === 0 ? formatBytes(bytes) : `${bytes} B`;
}

/** Folders that were no complete points: what the witness of a commit remembers. */
export function foreignFolders(entries: readonly CatalogEntry[]): string[] {
  return entries.filter((entry) => entry.kind !== "complete").map((entry) => entry.name.folderName);
}
