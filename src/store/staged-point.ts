// SPDX-License-Identifier: AGPL-3.0-or-later
// A point in the making: a hidden directory until commit(), removed without it.
import { randomUUID } from "node:crypto";
import type { FileHandle } from "node:fs/promises";
import { environmentError, quote, RequestError } from "../core/index.ts";
import { type FileIdentity, type Folder, isSameFile, type NewFile, type RegularFile } from "../host/index.ts";
import { type ArchiveName, formatArchiveName, type PointType } from "../pve/index.ts";
import { type CommitParts, commitPoint } from "./commit.ts";
import type { StoreContext } from "./context.ts";
import { explain } from "./durable.ts";
import { PointDamagedError } from "./errors.ts";
import { isPlainFileName, STAGING_PREFIX } from "./format/layout.ts";
import { unreadableFile } from "./image-file.ts";
import type { GuestLock } from "./lock/guest-lock.ts";
import type { Point } from "./point.ts";
import { assertFree } from "./publish.ts";
import type { Staged } from "./staged.ts";
import { sweepGuest } from "./sweep.ts";

export interface BeginRequest {
  /** The guest's lock; the staged point borrows it until commit or dispose. */
  readonly lock: GuestLock;
  readonly type: PointType;
  /** Unix time in seconds: names the point, orders nothing. */
  readonly epoch: number;
  readonly signal: AbortSignal;
}

export class StagedPoint implements Staged, AsyncDisposable {
  readonly uuid: string;
  readonly name: ArchiveName;
  /** Where the files are written until commit. */
  readonly folder: Folder;
  readonly #context: StoreContext;
  readonly #lock: GuestLock;
  readonly #files = new Map<string, FileIdentity>();
  readonly #written = new Map<string, Buffer>();
  #isOver = false;

  private constructor(context: StoreContext, lock: GuestLock, staged: Pick<StagedPoint, "name" | "uuid" | "folder">) {
    this.#context = context;
    this.#lock = lock;
    this.name = staged.name;
    this.uuid = staged.uuid;
    this.folder = staged.folder;
  }

  /**
   * Sweeps what dead jobs left and creates the staging directory.
   *
   * @throws PointExistsError if the name is taken; LockedError; EnvironmentError; the reason of `signal`
   */
  static async begin(context: StoreContext, request: BeginRequest): Promise<StagedPoint> {
    const { lock, signal } = request;
    const name = formatArchiveName(lock.vmid, request.type, request.epoch);
    await lock.assertHeld();
    await assertFree(lock.folder, name);
    await sweepGuest(context, lock, signal);
    signal.throwIfAborted();
    const uuid = randomUUID();
    const stagingName = `${STAGING_PREFIX}${uuid}`;
    const path = lock.folder.pathOf(stagingName);
    await explain("create", path, () => lock.folder.makeFolder(stagingName));
    const folder = await explain("open", path, () => lock.folder.openFolder(stagingName));
    return new StagedPoint(context, lock, { name, uuid, folder });
  }

  /** Name of the staging directory in the guest's directory. */
  get stagingName(): string {
    return `${STAGING_PREFIX}${this.uuid}`;
  }

  /** What was created so far, by name. */
  get files(): ReadonlyMap<string, FileIdentity> {
    return this.#files;
  }

  /** What writeFile() wrote, by name. */
  get written(): ReadonlyMap<string, Buffer> {
    return this.#written;
  }

  /** For messages. @throws RequestError for a name that is not a plain file name */
  pathOf(name: string): string {
    if (!isPlainFileName(name)) throw new RequestError(`Cannot use file name ${quote(name)} in a backup`);
    return this.folder.pathOf(name);
  }

  /** A file of the point, for the code that fills it. @throws RequestError for a name that is not a plain file name */
  newFile(name: string): NewFile {
    return {
      path: this.pathOf(name),
      create: () => this.#create(name),
      remove: async () => {
        this.#files.delete(name);
        await this.folder.removeFile(name);
      },
    };
  }

  /** Writes a small file (a config). @throws EnvironmentError */
  async writeFile(name: string, bytes: Buffer): Promise<void> {
    const path = this.pathOf(name);
    await explain("write", path, async () => {
      await using handle = await this.#create(name);
      await handle.writeFile(bytes);
      await this.#context.io.syncFile(handle, path);
    });
    this.#written.set(name, bytes);
  }

  /**
   * Opens a file that this job has created, never another one that took its name.
   *
   * @throws PointDamagedError if it is gone or was replaced; EnvironmentError
   */
  async openFile(name: string): Promise<RegularFile> {
    const path = this.folder.pathOf(name);
    const file = await this.folder.openFile(name).catch((error: unknown) => {
      throw unreadableFile(path, error);
    });
    const found = await file.handle.stat({ bigint: true });
    const created = this.#files.get(name);
    if (created !== undefined && isSameFile(found, created)) return file;
    await file[Symbol.asyncDispose]();
    throw new PointDamagedError(`Cannot commit "${path}": it is not the file that was created for the backup`);
  }

  async #create(name: string): Promise<FileHandle> {
    const handle = await this.folder.createFile(name);
    try {
      const { dev, ino } = await handle.stat({ bigint: true });
      this.#files.set(name, { dev, ino });
      return handle;
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  /**
   * Makes the point visible. A failure before the rename leaves nothing behind: the witness is put back, dispose
   * removes the directory. After the rename nothing fails any more; a problem only causes a warning.
   *
   * @throws RequestError, PointDamagedError, BaseUnusableError, LockedError, PointExistsError, EnvironmentError, or
   *   the reason of `signal`, each meaning: there is no point
   */
  async commit(parts: CommitParts, signal: AbortSignal): Promise<Point> {
    if (this.#isOver) throw new RequestError("Cannot commit a backup twice");
    const point = await commitPoint(this.#context, this.#lock, this, parts, signal);
    this.#isOver = true;
    return point;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#isOver) await this.#discard();
    this.#isOver = true;
    await this.folder[Symbol.asyncDispose]();
  }

  /** After the rename nothing of ours has this name; anything that has it by now is not ours. */
  async #discard(): Promise<void> {
    try {
      await this.#lock.folder.remove(this.stagingName);
    } catch (error) {
      const { message } = environmentError("remove", this.folder.path, error);
      this.#context.warn(`${message}; the next backup tries again`);
    }
  }
}
