// SPDX-License-Identifier: AGPL-3.0-or-later
// What travels between the bench and the process of one backup job: an argument in, a line out.
import type { BitmapMode } from "../../src/provider/index.ts";

export interface JobOptions {
  readonly storePath: string;
  /** Stands for / of the node. */
  readonly root: string;
  readonly compression: "none" | "zlib" | "zstd";
  readonly mode: "full" | "incremental";
  readonly epoch: number;
  readonly vmid: number;
  readonly device: string;
  readonly sizeBytes: number;
  readonly nbdPath: string;
  readonly bitmapMode: BitmapMode;
  readonly bitmapName: string | undefined;
  readonly guestConfig: string;
  /** Bytes per second; absent: no limit. */
  readonly bandwidthLimit?: number;
  /** The disk as a FUSE file, handed over instead of the NBD socket. */
  readonly fuseFile?: string;
}

export interface JobReport {
  /** Name of the archive: a folder below the store. */
  readonly archive: string;
  /** The kernel's word about this process, its worker threads included. */
  readonly peakBytes: number;
  /** From the call of backup_vm to the end of the first read; undefined if nothing was read. */
  readonly firstByteMs: number | undefined;
  /** How long backup_vm took. */
  readonly backupMs: number;
  readonly log: readonly string[];
}
