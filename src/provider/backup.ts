// SPDX-License-Identifier: AGPL-3.0-or-later
// What a provider does during a backup job. The names are those of PVE's hooks, and so is the order.
import type { DeviceSizes, GuestType } from "./guest.ts";

export type VmMechanism = "nbd" | "file-handle";
export type BitmapMode = "none" | "new" | "reuse";

/** A file that another process holds open: the Perl side's, which outlives the call. */
export interface HandleReference {
  readonly pid: number;
  readonly fd: number;
}

/** A volume as `backupVm` gets it. */
export interface VmVolume {
  readonly size: number;
  readonly bitmapMode: BitmapMode;
  /** Unix socket of the NBD server, whose exports are named after the devices; present with mechanism nbd. */
  readonly nbdPath: string | undefined;
  /** With mechanism nbd, present if a bitmap is used. */
  readonly bitmapName: string | undefined;
  /** Present with mechanism file-handle: the raw disk. FileHandleCalls asks for its dirty regions. */
  readonly fileHandle?: HandleReference;
}

export interface VmBackupInfo {
  /** Bytes per second; 0 means no limit. */
  readonly bandwidthLimit: number;
  readonly firewallConfig: Buffer | undefined;
}

export interface ContainerBackupInfo {
  /** Where the container is mounted, for the process that runs `backupContainer` only. */
  readonly directory: string;
  readonly sources: readonly string[];
  /** The container's root as the host sees it. */
  readonly backupUserId: number;
  readonly bandwidthLimit: number;
  readonly firewallConfig: Buffer | undefined;
}

/** What the Perl side opens as root of the host, and the process in the user namespace inherits. */
export type HandleToOpen =
  | {
      readonly kind: "file";
      /**
       * `/proc/<pid>/fd/<number>` of a process that holds the regular file open; opened for reading and writing. Any
       * other path is refused: its parts could be swapped until root opens it.
       */
      readonly path: string;
    }
  | {
      readonly kind: "socket";
      /** A listening Unix socket. */
      readonly path: string;
      /** Sent at once, with a newline behind it; printable ASCII. */
      readonly firstLine?: string;
    };

/**
 * Every method may reject with a HostError; `signal` aborts with one as its reason. A provider leaves out an optional
 * method if it has nothing to do there, and both container methods if it does not back up containers.
 */
export interface BackupHooks {
  jobInit?(startTime: number, signal: AbortSignal): Promise<void>;
  /** May be called twice. */
  jobCleanup?(signal: AbortSignal): Promise<void>;
  backupInit(vmid: number, vmtype: GuestType, startTime: number, signal: AbortSignal): Promise<{ archiveName: string }>;
  /**
   * Always called, also without a `backupInit`, and with `success` false also after a call with true.
   * A backup that is complete stays, whatever failed afterwards.
   */
  backupCleanup(
    vmid: number,
    vmtype: GuestType | undefined,
    success: boolean,
    error: string | undefined,
    signal: AbortSignal,
  ): Promise<{ archiveSize: number }>;
  backupGetMechanism(vmid: number, vmtype: GuestType): Promise<VmMechanism | "directory">;
  /** A failure is only logged: PVE would end the whole job. */
  backupHandleLogFile?(vmid: number, filename: string): Promise<void>;
  /** Devices that are missing from the result use no bitmap. */
  backupVmQueryIncremental(
    vmid: number,
    volumes: DeviceSizes,
    signal: AbortSignal,
  ): Promise<ReadonlyMap<string, "new" | "use">>;
  /** When it resolves, the backup is complete and listed. */
  backupVm(
    vmid: number,
    guestConfig: Buffer,
    volumes: ReadonlyMap<string, VmVolume>,
    info: VmBackupInfo,
    signal: AbortSignal,
  ): Promise<void>;
  /** @returns what `backupContainer` needs of the host, in the order in which it gets the numbers */
  backupContainerPrepare?(
    vmid: number,
    info: ContainerBackupInfo,
    signal: AbortSignal,
  ): Promise<readonly HandleToOpen[]>;
  /**
   * Runs in another process than all other methods: one that sees the container's mounts, perhaps in its user namespace.
   *
   * @param handles numbers of the handles that `backupContainerPrepare` asked for, in its order
   */
  backupContainer?(
    vmid: number,
    guestConfig: Buffer,
    excludePatterns: readonly string[],
    info: ContainerBackupInfo,
    handles: readonly number[],
    signal: AbortSignal,
  ): Promise<void>;
}
