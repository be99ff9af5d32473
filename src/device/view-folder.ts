// SPDX-License-Identifier: AGPL-3.0-or-later
// A private directory for something that lives as long as this process: restore-<pid>-<n> for what a restore reads,
// handoff-<pid>-<n> for a socket; with a record of its owner.
import { mkdir, rm } from "node:fs/promises";
import path from "node:path";
import { EnvironmentError, environmentError, errnoOf } from "../core/index.ts";
import { type ChildProcess, type ProcessIdentity, readProcess } from "../host/index.ts";
import { unmountBelow } from "./mounts.ts";
import { writeOwnerRecord } from "./owner-record.ts";

const MAX_FOLDERS = 10_000;

export const VIEW_FOLDER = /^(?:restore|handoff)-([1-9][0-9]{0,9})-([0-9]{1,5})$/;

type ViewKind = "restore" | "handoff";

export class ViewFolder implements AsyncDisposable {
  readonly path: string;
  readonly #owner: ProcessIdentity;
  readonly #children: ProcessIdentity[] = [];
  #nbdNode: number | undefined;

  private constructor(folder: string, owner: ProcessIdentity) {
    this.path = folder;
    this.#owner = owner;
  }

  /** @throws EnvironmentError if `runDir` cannot be written */
  static async create(runDir: string, kind: ViewKind = "restore"): Promise<ViewFolder> {
    const absolute = path.resolve(runDir);
    try {
      await mkdir(absolute, { recursive: true, mode: 0o700 });
      const owner = await readProcess(process.pid);
      if (owner === undefined) throw new EnvironmentError(`Cannot read "/proc/${process.pid}/stat": is /proc mounted?`);
      const folder = new ViewFolder(await makeFreeFolder(absolute, kind), owner);
      try {
        await folder.#writeRecord();
      } catch (error) {
        await rm(folder.path, { recursive: true, force: true }).catch(() => undefined); // a sweep takes it later
        throw error;
      }
      return folder;
    } catch (error) {
      throw environmentError("prepare a folder below", absolute, error);
    }
  }

  /** Records a process that serves this directory, so that a sweep can end it. */
  async addChild(child: ChildProcess): Promise<void> {
    const identity = await readProcess(child.pid);
    if (identity === undefined) return; // gone already; the code that waits for it reports that
    this.#children.push(identity);
    await this.#writeRecord();
  }

  /** Records a /dev/nbdX before it is connected, so that a sweep can tell whether it is free again. */
  async setNbdNode(index: number): Promise<void> {
    this.#nbdNode = index;
    await this.#writeRecord();
  }

  async #writeRecord(): Promise<void> {
    const record = { owner: this.#owner, children: this.#children };
    const node = this.#nbdNode;
    await writeOwnerRecord(this.path, node === undefined ? record : { ...record, nbdNode: node });
  }

  /** Unmounts what is left in it and removes it. @throws as removeViewFolder() */
  async [Symbol.asyncDispose](): Promise<void> {
    await removeViewFolder(this.path);
  }
}

/**
 * Never deletes through a mount: where something cannot be unmounted, the directory stays.
 *
 * @throws ChildProcessError if a mount stays, EnvironmentError
 */
export async function removeViewFolder(folder: string): Promise<void> {
  await unmountBelow(folder);
  try {
    await rm(folder, { recursive: true, force: true });
  } catch (error) {
    throw environmentError("remove", folder, error);
  }
}

async function makeFreeFolder(runDir: string, kind: ViewKind): Promise<string> {
  for (let n = 0; n < MAX_FOLDERS; n++) {
    const folder = path.join(runDir, `${kind}-${process.pid}-${n}`);
    try {
      await mkdir(folder, { mode: 0o700 });
      return folder;
    } catch (error) {
      if (errnoOf(error) !== "EEXIST") throw error;
    }
  }
  throw new EnvironmentError(`Cannot prepare a folder below ${JSON.stringify(runDir)}: ${MAX_FOLDERS} are in use`);
}
