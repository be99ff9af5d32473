// SPDX-License-Identifier: AGPL-3.0-or-later
// The contract between the bridge and a backup provider, types alone: the hooks, their parameters and results, and
// what the context of a call offers. Nothing here knows the directory provider, its names or its formats. The wire
// form of the same calls is in bridge, the first implementation in directory.
export type {
  AttributeValue,
  BackupProvider,
  BitmapMode,
  ContainerBackupInfo,
  ContainerDescriptors,
  ContainerHandoff,
  ContainerOffer,
  DirtyRegions,
  FileHandleCalls,
  GuestType,
  HandleReference,
  ProviderContext,
  Range,
  VmBackupInfo,
  VmMechanism,
  VmVolume,
  VolumeEntry,
} from "./backup-provider.ts";
