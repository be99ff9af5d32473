// SPDX-License-Identifier: AGPL-3.0-or-later
import type { BackupProvider, ProviderContext } from "./backup-provider.ts";
import { DirectoryProvider } from "./directory-provider.ts";

export * from "./backup-provider.ts";
export { DirectoryProvider, type DirectoryProviderOptions } from "./directory-provider.ts";

/**
 * Makes the provider of a storage.
 *
 * @throws RequestError if the storage's section has an unknown option or value
 */
export async function createProvider(context: ProviderContext): Promise<BackupProvider> {
  return new DirectoryProvider(context, { root: process.env.PVE_BACKUP_HOST_ROOT ?? "" });
}
