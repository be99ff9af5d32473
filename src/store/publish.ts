// SPDX-License-Identifier: AGPL-3.0-or-later
// The moment a point becomes visible: witness in flight, rename, then what may fail without harm.
import { lstat } from "node:fs/promises";
import { environmentError, errnoOf, messageOf } from "../core/index.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { PointExistsError } from "./errors.ts";
import type { GuestIdentity } from "./guest-identity.ts";
import type { GuestLock } from "./guest-lock.ts";
import { type ArchiveName, guestFolder } from "./layout.ts";
import { openPoint } from "./point.ts";
import { readState, writeState } from "./state.ts";
import { Witness } from "./witness.ts";

/** What the commit needs to know of a staged point. */
export interface StagedFolder {
  readonly uuid: string;
  readonly sequence: number;
  readonly name: ArchiveName;
  readonly folder: string;
}

/** Witness in flight, rename, settle. The rename is the commit. */
export async function publish(
  context: StoreContext,
  lock: GuestLock,
  staged: StagedFolder,
  { guest, foreign }: { readonly guest: GuestIdentity; readonly foreign: readonly string[] },
): Promise<void> {
  const { name, uuid } = staged;
  const parent = guestFolder(context.path, name.vmid);
  const witness = await Witness.locate(context.root, context.storeid, name.vmid, context.io);
  const before = await witness.readBytes();
  try {
    const previous = await witness.read();
    const known = previous.kind === "record" ? previous.record : { guest: {}, foreign: [] };
    await witness.write({ ...known, inFlight: uuid });
    await lock.assertHeld();
    await assertFree(context, name);
    await renameOnce(context, staged);
  } catch (error) {
    await witness.restore(before).catch((second: unknown) => {
      context.warn(`Cannot put back "${witness.path}": ${messageOf(second)}; the next backup is a full one`);
    });
    throw error;
  }
  const attempt = async (consequence: string, work: () => Promise<void>): Promise<boolean> => {
    try {
      await work();
      return true;
    } catch (error) {
      context.warn(`The backup is complete, but: ${messageOf(error)}; ${consequence}`);
      return false;
    }
  };
  const isDurable = await attempt("the next backup is a full one", async () => {
    await context.io.syncFolder(parent);
    await context.io.syncFolder(context.path); // of a guest's first backup the folder is new, too
  });
  await attempt("the store finds its state without it", () => writeNewState(context, staged));
  // Not durable: a power cut may take the point away, so its witness stays in flight.
  if (isDurable) await attempt("the next backup is a full one", () => witness.write({ settled: uuid, guest, foreign }));
}

/** @throws PointExistsError if anything has the name of the point */
export async function assertFree(context: StoreContext, name: ArchiveName): Promise<void> {
  const found = await lstat(pointFolder(context, name.vmid, name.folderName)).catch((error: unknown) => {
    if (errnoOf(error) === "ENOENT") return undefined;
    throw environmentError("look at", context.path, error);
  });
  if (found !== undefined) {
    throw new PointExistsError(`Cannot create "backup/${name.archive}": a backup of this second exists already`);
  }
}

/** On a network share the reply to a rename can get lost: what the folder says counts. */
async function renameOnce(context: StoreContext, staged: StagedFolder): Promise<void> {
  const target = pointFolder(context, staged.name.vmid, staged.name.folderName);
  try {
    await context.io.rename(staged.folder, target);
  } catch (error) {
    const isStaged = await lstat(staged.folder).then(
      () => true,
      () => false,
    );
    const published = isStaged ? undefined : await openPoint(context, staged.name.archive).catch(() => undefined);
    if (published?.uuid !== staged.uuid) throw error;
  }
}

async function writeNewState(context: StoreContext, staged: StagedFolder): Promise<void> {
  const folder = guestFolder(context.path, staged.name.vmid);
  const state = await readState(folder, context.warn);
  const newest = new Map(state.newest);
  newest.set(context.storeid, { uuid: staged.uuid, archive: staged.name.archive });
  await writeState(folder, { sequence: Math.max(state.sequence, staged.sequence), newest }, context.io);
}
