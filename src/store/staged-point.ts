// SPDX-License-Identifier: AGPL-3.0-or-later
// A point in the making: a hidden folder until commit(), gone without it.
import { randomUUID } from "node:crypto";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { environmentError, RequestError } from "../core/index.ts";
import { scanGuest } from "./catalog.ts";
import { type CommitParts, commitPoint } from "./commit.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { makeFolder } from "./durable.ts";
import type { GuestLock } from "./guest-lock.ts";
import {
  type ArchiveName,
  formatArchiveName,
  isPlainFileName,
  type PointType,
  quote,
  STAGING_PREFIX,
} from "./layout.ts";
import { MAX_SEQUENCE } from "./manifest.ts";
import type { Point } from "./point.ts";
import { assertFree } from "./publish.ts";
import { readState } from "./state.ts";
import { sweepGuest } from "./sweep.ts";

export interface BeginRequest {
  /** The guest's lock; the staged point borrows it until commit or dispose. */
  readonly lock: GuestLock;
  readonly type: PointType;
  /** Unix time in seconds: names the point, orders nothing. */
  readonly epoch: number;
  readonly signal: AbortSignal;
}

export class StagedPoint implements AsyncDisposable {
  readonly uuid: string;
  /** Commit number: higher than that of every point this guest ever had in this store. */
  readonly sequence: number;
  readonly name: ArchiveName;
  /** Where the files are written until commit. */
  readonly folder: string;
  readonly #context: StoreContext;
  readonly #lock: GuestLock;
  #isOver = false;

  private constructor(context: StoreContext, lock: GuestLock, name: ArchiveName, sequence: number) {
    this.#context = context;
    this.#lock = lock;
    this.name = name;
    this.sequence = sequence;
    this.uuid = randomUUID();
    this.folder = pointFolder(context, name.vmid, `${STAGING_PREFIX}${this.uuid}`);
  }

  /**
   * Sweeps what dead jobs left and creates the staging folder.
   *
   * @throws PointExistsError if the name is taken; LockedError; EnvironmentError; the reason of `signal`
   */
  static async begin(context: StoreContext, request: BeginRequest): Promise<StagedPoint> {
    const { lock, signal } = request;
    const name = formatArchiveName(lock.vmid, request.type, request.epoch);
    await assertFree(context, name);
    await sweepGuest(context, lock); // asks for the lock first
    const staged = new StagedPoint(context, lock, name, await nextSequence(context, lock.vmid, signal));
    signal.throwIfAborted();
    await makeFolder(staged.folder);
    return staged;
  }

  /** Path of a file to be written. @throws RequestError for a name that is no plain file name */
  pathOf(name: string): string {
    if (!isPlainFileName(name)) throw new RequestError(`Cannot use file name ${quote(name)} in a backup`);
    return join(this.folder, name);
  }

  /** Writes a small file (a config) with the right mode. @throws EnvironmentError */
  async writeFile(name: string, bytes: Buffer): Promise<void> {
    await this.#context.io.createFile(this.pathOf(name), bytes);
  }

  /**
   * Makes the point visible. A failure before the rename leaves nothing behind: the witness is put back,
   * dispose removes the folder. After the rename nothing fails any more; what goes wrong is warned of.
   *
   * @throws RequestError, PointDamagedError, BaseUnusableError, LockedError, PointExistsError, EnvironmentError,
   *   or the reason of `signal`, each meaning: there is no point
   */
  async commit(parts: CommitParts, signal: AbortSignal): Promise<Point> {
    if (this.#isOver) throw new RequestError("Cannot commit a backup twice");
    const point = await commitPoint(this.#context, this.#lock, this, parts, signal);
    this.#isOver = true;
    return point;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isOver) return;
    this.#isOver = true;
    try {
      await rm(this.folder, { recursive: true, force: true });
    } catch (error) {
      const { message } = environmentError("remove", this.folder, error);
      this.#context.warn(`${message}; the next backup tries again`);
    }
  }
}

async function nextSequence(context: StoreContext, vmid: number, signal: AbortSignal): Promise<number> {
  const state = await readState(pointFolder(context, vmid, "."), context.warn);
  let highest = state.sequence;
  for (const entry of await scanGuest(context, vmid, signal)) {
    if (entry.kind === "complete") highest = Math.max(highest, entry.manifest.sequence);
  }
  if (highest >= MAX_SEQUENCE)
    throw new RequestError(`Cannot number the next backup of guest ${vmid}: ${highest} is used`);
  return highest + 1;
}
