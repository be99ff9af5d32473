// SPDX-License-Identifier: AGPL-3.0-or-later
// The directory provider: PVE's hooks on a store of plain files. Guests are read by source, written by qcow2 and
// archive, kept by store; the code here decides the order, and what the task log says.
import type { Provider, ProviderContext } from "../provider/index.ts";
import { DirectoryProvider } from "./directory-provider.ts";

export { DirectoryProvider } from "./directory-provider.ts";

/**
 * Makes the provider of a storage.
 *
 * @throws RequestError if the storage's section has an unknown option or value
 */
export async function createProvider(context: ProviderContext): Promise<Provider> {
  return new DirectoryProvider(context, { root: process.env.PVE_BACKUP_HOST_ROOT ?? "" });
}
