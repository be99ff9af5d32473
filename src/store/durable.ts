// SPDX-License-Identifier: AGPL-3.0-or-later
// The acts that make a point durable. An interface, so that tests see their order and make each fail.
import { randomUUID } from "node:crypto";
import { constants } from "node:fs";
import { mkdir, open, rename, rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import { environmentError, errnoOf } from "../core/index.ts";
import { TEMP_PREFIX } from "./layout.ts";

export const FILE_MODE = 0o600;
export const FOLDER_MODE = 0o700;

export interface DurableIo {
  /** Creates a new file with `bytes` and syncs it; its name is durable only after syncFolder(). */
  createFile(path: string, bytes: Buffer): Promise<void>;
  /** Replaces or creates a file at once and durably: readers see the old or the new bytes. */
  replaceFile(path: string, bytes: Buffer): Promise<void>;
  syncFile(path: string): Promise<void>;
  syncFolder(path: string): Promise<void>;
  rename(from: string, to: string): Promise<void>;
}

const CREATE_FLAGS = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;

/** The real thing; every failure is an EnvironmentError. */
export const durableIo: DurableIo = {
  async createFile(path, bytes) {
    await explain("write", path, () => create(path, bytes));
  },

  async replaceFile(path, bytes) {
    const staged = join(dirname(path), `${TEMP_PREFIX}${randomUUID()}`);
    try {
      await explain("write", path, async () => {
        await create(staged, bytes);
        await rename(staged, path);
      });
    } catch (error) {
      await rm(staged, { force: true }).catch(() => undefined);
      throw error;
    }
    await this.syncFolder(dirname(path));
  },

  async syncFile(path) {
    await explain("sync", path, async () => {
      await using handle = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW);
      await sync(() => handle.sync());
    });
  },

  async syncFolder(path) {
    await explain("sync", path, async () => {
      await using handle = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
      await sync(() => handle.sync());
    });
  },

  async rename(from, to) {
    await explain("rename", from, () => rename(from, to));
  },
};

async function create(path: string, bytes: Buffer): Promise<void> {
  await using handle = await open(path, CREATE_FLAGS, FILE_MODE);
  await handle.writeFile(bytes);
  await sync(() => handle.sync());
}

/** File systems without fsync (CIFS for folders, the cluster file system of PVE) answer EINVAL. */
async function sync(act: () => Promise<void>): Promise<void> {
  try {
    await act();
  } catch (error) {
    const errno = errnoOf(error);
    if (errno !== "EINVAL" && errno !== "ENOSYS" && errno !== "ENOTSUP" && errno !== "EOPNOTSUPP") throw error;
  }
}

async function explain(act: string, path: string, work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (error) {
    throw environmentError(act, path, error);
  }
}

/** Creates a folder that only its owner may enter; true if it was not there before. */
export async function makeFolder(path: string): Promise<boolean> {
  try {
    await mkdir(path, { mode: FOLDER_MODE });
    return true;
  } catch (error) {
    if (errnoOf(error) === "EEXIST") return false;
    throw environmentError("create", path, error);
  }
}
