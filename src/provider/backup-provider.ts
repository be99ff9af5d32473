// SPDX-License-Identifier: AGPL-3.0-or-later
// The contract between the bridge and a backup provider: the hooks of PVE's
// PVE::BackupProvider::Plugin::Base in its order, with bytes as Buffers. The bridge knows only this.

import type { LogFunction } from "../core/index.ts";

export type GuestType = "qemu" | "lxc";
export type VmMechanism = "nbd" | "file-handle";
export type BitmapMode = "none" | "new" | "reuse";

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

/** What only the Perl side can do with the devices of `backup_vm` that are handed over as file handles. */
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
  /** PVE::Storage::APIVER of the host. */
  readonly apiver: number;
  readonly log: LogFunction;
  /** Present where a Perl side listens; they only answer while a `backup_vm` runs. */
  readonly fileHandles?: FileHandleCalls;
}

/** A file that another process holds open: the Perl side's, which outlives the call. */
export interface HandleReference {
  readonly pid: number;
  readonly fd: number;
}

/** A volume as `backup_vm` gets it. */
export interface VmVolume {
  readonly size: number;
  readonly bitmapMode: BitmapMode;
  /** Unix socket of the NBD server; present with mechanism nbd. */
  readonly nbdPath: string | undefined;
  /** With mechanism nbd, present if a bitmap is used. */
  readonly bitmapName: string | undefined;
  /** Present with mechanism file-handle: the raw disk. Its dirty regions are asked for by FileHandleCalls. */
  readonly fileHandle?: HandleReference;
}

export interface VmBackupInfo {
  /** Bytes per second; 0 means no limit. */
  readonly bandwidthLimit: number;
  readonly firewallConfig: Buffer | undefined;
}

export interface ContainerBackupInfo {
  readonly directory: string;
  readonly sources: readonly string[];
  readonly backupUserId: number;
  readonly bandwidthLimit: number;
  readonly firewallConfig: Buffer | undefined;
}

/** Where the Perl side finds what it opens as root, and the child in the user namespace inherits. */
export interface ContainerHandoff {
  /** The archive, as `/proc/<pid>/fd/<number>` of a process that holds it: to be opened for reading and writing. */
  readonly archivePath: string;
  /** Unix socket for one connection. */
  readonly socketPath: string;
  /** The first line of the connection is `{"token": …}`. */
  readonly token: string;
}

/** Numbers of the two handles in the process that inherited them. */
export interface ContainerDescriptors {
  readonly archiveFd: number;
  readonly handoffFd: number;
}

/** How a container's files are offered to a restore. */
export type ContainerOffer = { readonly tarPath: string } | { readonly archiveDirectory: string };

/** One row of a storage listing, as PVE wants it. */
export interface VolumeEntry {
  readonly volname: string;
  readonly vmid: number;
  readonly subtype: GuestType;
  /** Unix time of the backup, from its name. */
  readonly ctime: number;
  /** What it occupies on the storage, in bytes; never 0, PVE takes 0 for "unknown". */
  readonly size: number;
  readonly format: "directory";
  readonly notes?: string;
  readonly protected: boolean;
  /** Volume name of the base of an incremental backup. */
  readonly parent?: string;
}

/** An attribute value as PVE passes it; undefined where the attribute is unknown. */
export type AttributeValue = string | number | undefined;

/** Every method may reject with a HostError; `signal` aborts with one as its reason. */
export interface BackupProvider extends AsyncDisposable {
  readonly name: string;

  jobInit(startTime: number, signal: AbortSignal): Promise<void>;
  jobCleanup(signal: AbortSignal): Promise<void>;
  backupInit(vmid: number, vmtype: GuestType, startTime: number, signal: AbortSignal): Promise<{ archiveName: string }>;
  backupCleanup(
    vmid: number,
    vmtype: GuestType | undefined,
    success: boolean,
    error: string | undefined,
    signal: AbortSignal,
  ): Promise<{ archiveSize: number }>;
  backupGetMechanism(vmid: number, vmtype: GuestType): Promise<VmMechanism | "directory">;
  /** Never rejects for reasons of its own: PVE ends the whole job if it does. */
  backupHandleLogFile(vmid: number, filename: string): Promise<void>;
  /** Devices that are missing from the result use no bitmap. */
  backupVmQueryIncremental(
    vmid: number,
    volumes: ReadonlyMap<string, { readonly size: number }>,
    signal: AbortSignal,
  ): Promise<ReadonlyMap<string, "new" | "use">>;
  backupVm(
    vmid: number,
    guestConfig: Buffer,
    volumes: ReadonlyMap<string, VmVolume>,
    info: VmBackupInfo,
    signal: AbortSignal,
  ): Promise<void>;
  backupContainerPrepare(vmid: number, info: ContainerBackupInfo, signal: AbortSignal): Promise<ContainerHandoff>;
  /** In another process than the others: the one where the container is mounted. */
  backupContainer(
    vmid: number,
    guestConfig: Buffer,
    excludePatterns: readonly string[],
    info: ContainerBackupInfo,
    descriptors: ContainerDescriptors,
    signal: AbortSignal,
  ): Promise<void>;

  restoreGetMechanism(
    volname: string,
    signal: AbortSignal,
  ): Promise<{ mechanism: "qemu-img" | "tar" | "directory"; vmtype: GuestType }>;
  archiveGetGuestConfig(volname: string, signal: AbortSignal): Promise<Buffer>;
  archiveGetFirewallConfig(volname: string, signal: AbortSignal): Promise<Buffer | undefined>;
  restoreVmInit(volname: string, signal: AbortSignal): Promise<ReadonlyMap<string, { readonly size: number }>>;
  restoreVmCleanup(volname: string, signal: AbortSignal): Promise<void>;
  restoreVmVolumeInit(volname: string, deviceName: string, signal: AbortSignal): Promise<{ qemuImgPath: string }>;
  restoreVmVolumeCleanup(volname: string, deviceName: string, signal: AbortSignal): Promise<void>;
  restoreContainerInit(volname: string, signal: AbortSignal): Promise<ContainerOffer>;
  restoreContainerCleanup(volname: string, signal: AbortSignal): Promise<void>;

  // The storage plugin's class methods that need to look into the store.
  listVolumes(vmid: number | undefined, signal: AbortSignal): Promise<VolumeEntry[]>;
  volumeInfo(
    volname: string,
    signal: AbortSignal,
  ): Promise<{ size: number; used: number; format: "directory"; path: string; parent?: string }>;
  getVolumeAttribute(volname: string, attribute: string, signal: AbortSignal): Promise<AttributeValue>;
  /** @throws RequestError for an attribute it does not know */
  updateVolumeAttribute(volname: string, attribute: string, value: AttributeValue, signal: AbortSignal): Promise<void>;
  /** @throws UnsupportedError as long as points cannot be removed */
  freeVolume(volname: string, signal: AbortSignal): Promise<void>;
}
