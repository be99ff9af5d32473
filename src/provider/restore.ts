// SPDX-License-Identifier: AGPL-3.0-or-later
// What a provider does to restore a backup.
import type { DeviceSizes, GuestType } from "./guest.ts";

/** How a container's files are offered to a restore. */
export type ContainerOffer = { readonly tarPath: string } | { readonly archiveDirectory: string };

/**
 * Every method may reject with a HostError; `signal` aborts with one as its reason. A provider leaves out an optional
 * method if it has nothing to do there, and `restoreContainerInit` if it has no backups of containers.
 */
export interface RestoreHooks {
  restoreGetMechanism(
    volname: string,
    signal: AbortSignal,
  ): Promise<{ mechanism: "qemu-img" | "tar" | "directory"; vmtype: GuestType }>;
  /** Byte-exact. */
  archiveGetGuestConfig(volname: string, signal: AbortSignal): Promise<Buffer>;
  /** Byte-exact; undefined if the backup holds none; an empty one is not undefined. */
  archiveGetFirewallConfig(volname: string, signal: AbortSignal): Promise<Buffer | undefined>;
  restoreVmInit(volname: string, signal: AbortSignal): Promise<DeviceSizes>;
  /** May be called twice, and without a `restoreVmInit`. */
  restoreVmCleanup?(volname: string, signal: AbortSignal): Promise<void>;
  /** @returns path of a regular file or a block device with raw content, there until the cleanup */
  restoreVmVolumeInit(volname: string, deviceName: string, signal: AbortSignal): Promise<{ qemuImgPath: string }>;
  restoreVmVolumeCleanup?(volname: string, deviceName: string, signal: AbortSignal): Promise<void>;
  restoreContainerInit?(volname: string, signal: AbortSignal): Promise<ContainerOffer>;
  restoreContainerCleanup?(volname: string, signal: AbortSignal): Promise<void>;
}
