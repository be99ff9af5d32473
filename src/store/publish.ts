// SPDX-License-Identifier: AGPL-3.0-or-later
// The moment a point becomes visible: witness in flight, rename, a check of what has the name now, then its records.
// Only what is really there settles the witness.
import { messageOf, RequestError } from "../core/index.ts";
import { type Folder, isSameFile } from "../host/index.ts";
import type { ArchiveName, GuestIdentity } from "../pve/index.ts";
import { foreignFolders } from "./base-verdict.ts";
import { classifyFolder, type FileTable, lookAtFiles, openGuest } from "./catalog.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { explain } from "./durable.ts";
import { PointDamagedError, PointExistsError } from "./errors.ts";
import { unreadableFile } from "./image-file.ts";
import type { GuestLock } from "./lock/guest-lock.ts";
import type { GuestSnapshot } from "./snapshot.ts";
import type { Staged } from "./staged.ts";
import { writeState } from "./state.ts";
import { Witness } from "./witness.ts";

interface PublishRequest {
  readonly guest: GuestIdentity;
  readonly sequence: number;
  /** The guest's part of the store, taken a moment ago. */
  readonly before: GuestSnapshot;
}

/** Witness in flight, rename, settle. The rename is the commit. */
export async function publish(
  context: StoreContext,
  lock: GuestLock,
  staged: Staged,
  { guest, sequence, before: now }: PublishRequest,
): Promise<void> {
  const { name, uuid } = staged;
  const witness = await Witness.locate(context.root, context.storeid, name.vmid, context.io);
  const before = await witness.readBytes();
  try {
    const previous = await witness.read();
    const known = previous.kind === "record" ? previous.record : { guest: {}, foreign: [] };
    await witness.write({ ...known, inFlight: uuid });
    await lock.assertHeld();
    await assertFree(lock.folder, name);
    await renameOnce(context, lock.folder, staged);
  } catch (error) {
    await witness.restore(before).catch((second: unknown) => {
      context.warn(`Cannot put back "${witness.path}": ${messageOf(second)}; the next backup is a full one`);
    });
    throw error;
  }
  await assertPublished(context, staged);
  const attempt = async (work: () => Promise<void>): Promise<boolean> => {
    try {
      await work();
      return true;
    } catch (error) {
      context.warn(`The backup is complete, but: ${messageOf(error)}; the next backup is a full one`);
      return false;
    }
  };
  const isDurable = await attempt(async () => {
    await context.io.syncFolder(lock.folder);
    await context.io.syncFolder(context.folder); // at a guest's first backup its directory is new, too
  });
  const isRemembered = await attempt(() => writeNewState(context, lock.folder, staged, { sequence, before: now }));
  // If the point is not durable, a power cut may take it away. If it is not remembered, the store names an older one
  // as the last. In both cases the witness stays in flight, and no bitmap is trusted.
  if (isDurable && isRemembered) {
    await attempt(() => witness.write({ settled: uuid, guest, foreign: foreignFolders(now.entries) }));
  }
}

/** @throws PointExistsError if anything has the name of the point */
export async function assertFree(guest: Folder, name: ArchiveName): Promise<void> {
  const path = guest.pathOf(name.folderName);
  const found = await explain("look at", path, () => guest.look(name.folderName));
  if (found !== undefined) {
    throw new PointExistsError(`Cannot create "backup/${name.archive}": a backup with this timestamp already exists`);
  }
}

/** On a network share the reply to a rename can get lost: what the directory says counts. */
async function renameOnce(context: StoreContext, guest: Folder, staged: Staged): Promise<void> {
  const { folder, name, stagingName } = staged;
  try {
    await context.io.rename(guest, stagingName, guest, name.folderName);
  } catch (error) {
    if (!(await guest.isNamed(name.folderName, folder.identity).catch(() => false))) throw error;
  }
}

/**
 * Checks what was published, by the path that every reader will take: the directory that has the name is the one that
 * was made, and it holds what was written and nothing else.
 *
 * @throws PointDamagedError, EnvironmentError; the witness stays in flight then
 */
async function assertPublished(context: StoreContext, staged: Staged): Promise<void> {
  const { folder, name, uuid } = staged;
  const act = `Cannot commit "backup/${name.archive}"`;
  const changed = (what: string): PointDamagedError =>
    new PointDamagedError(`${act}: ${what}, another client is changing the storage`, {
      hint: "nothing is lost: the next backup is a full one",
    });
  await using guest = await openGuest(context, name.vmid);
  const path = pointFolder(context, name.vmid, name.folderName);
  const isThere =
    guest !== undefined && (await explain("look at", path, () => guest.isNamed(name.folderName, folder.identity)));
  if (guest === undefined || !isThere) throw changed("the directory of that name is not the one that was written");
  try {
    assertOnlyOurs(staged, await lookAtFiles(folder, "must stay"));
  } catch (error) {
    throw error instanceof PointDamagedError || error instanceof RequestError
      ? changed(error.message.replace(/^Cannot commit /, ""))
      : unreadableFile(folder.path, error);
  }
  const entry = await classifyFolder(guest, name);
  if (entry?.kind === "damaged") throw changed(`it is damaged, ${entry.reason}`);
  if (entry?.kind !== "complete" || entry.manifest.uuid !== uuid) throw changed("its manifest was replaced");
}

/**
 * Checks that the directory holds exactly the files that the job has created.
 *
 * @throws RequestError naming a file that it has not created; PointDamagedError naming one that is gone or was
 *   replaced
 */
export function assertOnlyOurs({ files, folder }: Pick<Staged, "files" | "folder">, found: FileTable): void {
  const foreign = [...found.keys()].find((name) => !files.has(name));
  if (foreign !== undefined) {
    throw new RequestError(`Cannot commit "${folder.pathOf(foreign)}": this backup did not write it`);
  }
  for (const [name, created] of files) {
    const now = found.get(name);
    const path = folder.pathOf(name);
    if (now === undefined) throw new PointDamagedError(`Cannot commit "${path}": it is gone`);
    if (now.kind !== "file" || !isSameFile(now, created)) {
      throw new PointDamagedError(`Cannot commit "${path}": it is not the file that was created for the backup`);
    }
  }
}

async function writeNewState(
  context: StoreContext,
  guest: Folder,
  { name, uuid }: Staged,
  { sequence, before: { state } }: Pick<PublishRequest, "sequence" | "before">,
): Promise<void> {
  const newest = new Map(state.kind === "state" ? state.state.newest : []);
  newest.set(context.storeid, { uuid, archive: name.archive });
  await writeState(guest, { sequence, newest }, context.io);
}
