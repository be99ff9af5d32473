// SPDX-License-Identifier: AGPL-3.0-or-later
// Which point is the newest, and whether QEMU's bitmaps tell what changed since it, as far as names, records and
// witnesses tell. No file of a chain is opened.
import { isSameProcess } from "../host/index.ts";
import type { GuestIdentity } from "../pve/index.ts";
import type { CatalogEntry, CompleteEntry } from "./catalog.ts";
import type { StoreContext } from "./context.ts";
import type { Memories } from "./snapshot.ts";
import type { WitnessRecord } from "./witness.ts";

/** Why everything is read: the end of the line "full backup of ...", or of "... is read". */
export class NotUsable extends Error {}

export interface Verdict {
  readonly newest: CompleteEntry;
  readonly record: WitnessRecord;
}

/** The newest point of this storage, if everything that must agree on it does. @throws NotUsable */
export function judge(
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
export function judgeAll(...asked: Parameters<typeof judge>): Verdict {
  const verdict = judge(...asked);
  checkForeign(asked[1], verdict.record);
  return verdict;
}

/**
 * The newest point of this storage, whatever the records say of its bitmap: a backup that reads everything can build on
 * it by comparing content. Undefined if there is none, or two claim to be the newest.
 */
export function newestOf({ storeid }: StoreContext, entries: readonly CatalogEntry[]): CompleteEntry | undefined {
  const [first, second] = ownPoints(entries, storeid).sort((a, b) => b.manifest.sequence - a.manifest.sequence);
  return first?.manifest.sequence === second?.manifest.sequence ? undefined : first;
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
export function checkForeign(entries: readonly CatalogEntry[], record: WitnessRecord | undefined): void {
  if (record === undefined) return; // no bitmap is trusted anyway
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

/** Directories that were not complete points: the witness of a commit remembers them. */
export function foreignFolders(entries: readonly CatalogEntry[]): string[] {
  return entries.filter((entry) => entry.kind !== "complete").map((entry) => entry.name.folderName);
}
