// SPDX-License-Identifier: AGPL-3.0-or-later
// The contract between the bridge and a backup provider: PVE's hooks in three roles, with bytes as Buffers.
// The bridge knows nothing else of a provider. docs/writing-a-provider.md builds one.
import type { LogFunction } from "../core/index.ts";
import type { BackupHooks } from "./backup.ts";
import type { RestoreHooks } from "./restore.ts";
import type { StorageHooks } from "./storage.ts";

/** Half-open range in bytes. */
export interface Range {
  readonly offset: number;
  readonly length: number;
}

export interface DirtyRegions {
  /** In ascending order. */
  readonly regions: readonly Range[];
  /** True when no region follows. */
  readonly done: boolean;
}

/** What only the Perl side can do with the devices of `backupVm` that are handed over as file handles. */
export interface FileHandleCalls {
  /** @param timeoutMs how long the answer may take; then the Perl side ends the backup */
  nextDirtyRegions(device: string, max: number, timeoutMs: number, signal: AbortSignal): Promise<DirtyRegions>;
  deallocate(device: string, ranges: readonly Range[], signal: AbortSignal): Promise<void>;
}

/** What `initialize` told us about the storage and the node. */
export interface ProviderContext {
  /** Storage id of storage.cfg. */
  readonly storeid: string;
  /** The storage's section of storage.cfg; values as PVE parsed them. */
  readonly scfg: Readonly<Record<string, unknown>>;
  /** PVE node name. */
  readonly nodename: string;
  readonly log: LogFunction;
  /** Present where a Perl side listens; they only answer while a `backupVm` runs. */
  readonly fileHandles?: FileHandleCalls;
}

/** Dispose aborts nothing: it is called when no method runs any more, and releases everything that is held. */
export interface Provider extends AsyncDisposable {
  readonly backup: BackupHooks;
  readonly restore: RestoreHooks;
  readonly storage: StorageHooks;
}

/** @throws RequestError if the storage's section cannot be used */
export type ProviderFactory = (context: ProviderContext) => Promise<Provider>;
