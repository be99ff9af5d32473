// SPDX-License-Identifier: AGPL-3.0-or-later
// What a provider does for the storage plugin's class methods: each call comes from a process that makes this one.
import type { GuestType } from "./guest.ts";

/** One row of a storage listing, as PVE expects it. */
export interface VolumeEntry {
  readonly volname: string;
  readonly vmid: number;
  readonly subtype: GuestType;
  /** Unix time of the backup. */
  readonly ctime: number;
  /** Bytes that it occupies on the storage; never 0, which PVE takes for "unknown". */
  readonly size: number;
  /** One short word for the GUI's Format column, e.g. "raw". */
  readonly format: string;
  readonly notes?: string;
  readonly protected: boolean;
  /** Volume name of the backup that this one builds on. */
  readonly parent?: string;
}

export interface VolumeInfo {
  /** In bytes, never 0. */
  readonly size: number;
  readonly used: number;
  readonly format: string;
  /** Volume name of the backup that this one builds on. */
  readonly parent?: string;
}

/** An attribute value as PVE passes it; undefined where the attribute is unknown. */
export type AttributeValue = string | number | undefined;

/** PVE's retention options: how many to keep, 0 or absent where the rule is not used. */
export interface KeepOptions {
  readonly all?: boolean;
  readonly last?: number;
  readonly hourly?: number;
  readonly daily?: number;
  readonly weekly?: number;
  readonly monthly?: number;
  readonly yearly?: number;
}

export interface PruneRequest {
  readonly keep: KeepOptions;
  /** Undefined: every guest's backups. */
  readonly vmid: number | undefined;
  readonly type: GuestType | undefined;
  /** True: mark only. */
  readonly dryrun: boolean;
}

/** A backup, and what the retention does with it. */
export interface PruneEntry extends Pick<VolumeEntry, "volname" | "vmid" | "subtype" | "ctime"> {
  readonly mark: "keep" | "remove" | "protected";
}

/** Every method may reject with a HostError; `signal` aborts with one as its reason. */
export interface StorageHooks {
  listVolumes(vmid: number | undefined, signal: AbortSignal): Promise<VolumeEntry[]>;
  volumeInfo(volname: string, signal: AbortSignal): Promise<VolumeInfo>;
  getVolumeAttribute(volname: string, attribute: string, signal: AbortSignal): Promise<AttributeValue>;
  /** @throws RequestError for an attribute it does not know */
  updateVolumeAttribute(volname: string, attribute: string, value: AttributeValue, signal: AbortSignal): Promise<void>;
  /** @throws UnsupportedError if the provider cannot remove backups */
  freeVolume(volname: string, signal: AbortSignal): Promise<void>;
  /**
   * Marks the backups of each guest by PVE's own rules, and removes what is marked so unless it is a dry run.
   *
   * @throws UnsupportedError if there is something to remove and the provider cannot remove backups
   */
  pruneBackups(request: PruneRequest, signal: AbortSignal): Promise<PruneEntry[]>;
}
