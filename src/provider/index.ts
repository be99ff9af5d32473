// SPDX-License-Identifier: AGPL-3.0-or-later
// The contract that every backup provider meets: hooks of a backup, of a restore, of the storage plugin. Types alone.
// The bridge calls it, the composition root chooses the implementation; nothing in here knows a provider.
export type {
  BackupHooks,
  BitmapMode,
  ContainerBackupInfo,
  HandleReference,
  HandleToOpen,
  VmBackupInfo,
  VmMechanism,
  VmVolume,
} from "./backup.ts";
export type { DeviceSizes, GuestType } from "./guest.ts";
export type { DirtyRegions, FileHandleCalls, Provider, ProviderContext, ProviderFactory, Range } from "./provider.ts";
export type { ContainerOffer, RestoreHooks } from "./restore.ts";
export type {
  AttributeValue,
  KeepOptions,
  PruneEntry,
  PruneRequest,
  StorageHooks,
  VolumeEntry,
  VolumeInfo,
} from "./storage.ts";
