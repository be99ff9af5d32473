// SPDX-License-Identifier: AGPL-3.0-or-later
// The directory provider: PVE's hooks on a store of plain files.
import type { Provider, ProviderContext } from "../provider/index.ts";
import { DirectoryBackupHooks } from "./backup-hooks.ts";
import { DirectoryRestoreHooks } from "./restore-hooks.ts";
import { type DirectoryProviderOptions, StorageAccess } from "./storage-access.ts";
import { DirectoryStorageHooks } from "./storage-hooks.ts";

export class DirectoryProvider implements Provider {
  readonly backup: DirectoryBackupHooks;
  readonly restore: DirectoryRestoreHooks;
  readonly storage: DirectoryStorageHooks;
  readonly #access: StorageAccess;

  /** @throws RequestError if the storage's section has an unknown option or value */
  constructor(context: ProviderContext, options: DirectoryProviderOptions = {}) {
    this.#access = new StorageAccess(context, options);
    this.backup = new DirectoryBackupHooks(this.#access);
    this.restore = new DirectoryRestoreHooks(this.#access);
    this.storage = new DirectoryStorageHooks(this.#access);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.restore[Symbol.asyncDispose]();
    await this.backup[Symbol.asyncDispose]();
    await this.#access[Symbol.asyncDispose]();
  }
}
