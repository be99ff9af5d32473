// SPDX-License-Identifier: AGPL-3.0-or-later
// The operations that make a point durable. This is an interface so tests can see their order and make each one fail.
import { randomUUID } from "node:crypto";
import type { FileHandle } from "node:fs/promises";
import { EnvironmentError, environmentError, errnoOf, type HostError } from "../core/index.ts";
import { FileProblem, type Folder } from "../host/index.ts";
import { TEMP_PREFIX } from "./format/layout.ts";

export interface DurableIo {
  /** Replaces or creates a file atomically and durably: readers see the old or the new bytes. */
  replaceFile(folder: Folder, name: string, bytes: Buffer): Promise<void>;
  /** What was written to an open file. @param path for messages */
  syncFile(handle: FileHandle, path: string): Promise<void>;
  syncFolder(folder: Folder): Promise<void>;
  rename(from: Folder, name: string, to: Folder, newName: string): Promise<void>;
}

/** The real thing; every failure is an EnvironmentError. */
export const durableIo: DurableIo = {
  async replaceFile(folder, name, bytes) {
    const staged = `${TEMP_PREFIX}${randomUUID()}`;
    const path = folder.pathOf(name);
    try {
      await explain("write", path, async () => {
        await using handle = await folder.createFile(staged);
        await handle.writeFile(bytes);
        await sync(() => handle.sync());
      });
      await explain("write", path, () => folder.rename(staged, folder, name));
    } catch (error) {
      await folder.removeFile(staged).catch(() => undefined);
      throw error;
    }
    await this.syncFolder(folder);
  },

  async syncFile(handle, path) {
    await explain("sync", path, () => sync(() => handle.sync()));
  },

  async syncFolder(folder) {
    await explain("sync", folder.path, () => sync(() => folder.sync()));
  },

  async rename(from, name, to, newName) {
    await explain("rename", from.pathOf(name), () => from.rename(name, to, newName));
  },
};

/** File systems without fsync (CIFS for directories, PVE's cluster file system) answer EINVAL. */
async function sync(act: () => Promise<void>): Promise<void> {
  try {
    await act();
  } catch (error) {
    const errno = errnoOf(error);
    if (errno !== "EINVAL" && errno !== "ENOSYS" && errno !== "ENOTSUP" && errno !== "EOPNOTSUPP") throw error;
  }
}

/** Puts what `work` throws into words: `Cannot <act> "<path>": ...`. */
export async function explain<T>(act: string, path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    throw wordProblem(act, path, error);
  }
}

/** Puts into words a FileProblem (the wrong thing is at the path) or the system's error. */
export function wordProblem(act: string, path: string, error: unknown): HostError {
  if (!(error instanceof FileProblem)) return environmentError(act, path, error);
  return new EnvironmentError(`Cannot ${act} "${path}": ${error.message}`, { cause: error });
}

/** Opens a directory of the store, creating it if it does not exist. @throws EnvironmentError, also if it is a link */
export async function openOrMakeFolder(parent: Folder, name: string): Promise<Folder> {
  const path = parent.pathOf(name);
  await explain("create", path, () => parent.makeFolder(name));
  return await explain("open", path, () => parent.openFolder(name));
}
