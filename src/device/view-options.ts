// SPDX-License-Identifier: AGPL-3.0-or-later
// What a raw view is, however it is made.
import type { RegularFile } from "../host/index.ts";
import type { NbdHost } from "./nbd-host.ts";

/**
 * "nbd": a /dev/nbdX. "fuse": a file, by qemu-storage-daemon ("fuse-export") or nbdfuse ("nbdfuse"), whichever this
 * machine has. "auto": /dev/nbdX if the kernel module is loaded and a node is free, otherwise a file.
 */
export type RawViewMechanism = "auto" | "nbd" | "fuse" | "fuse-export" | "nbdfuse";

/** A raw file or block device that exists until it is disposed. */
export interface RawView extends AsyncDisposable {
  readonly path: string;
  readonly sizeBytes: number;
  /**
   * What happened to the server, if it no longer serves. A reader may not have noticed: a node or a file without a
   * server can have the size 0, and "qemu-img convert -n" copies nothing from it and succeeds.
   */
  findTrouble(): Promise<string | undefined>;
}

export interface RawViewOptions {
  /**
   * Open qcow2 files, top first, borrowed as long as the view exists. The backing names in their headers are ignored.
   */
  readonly chain: readonly RegularFile[];
  /** The size that it must have: the guest disk's, a multiple of 512. */
  readonly sizeBytes: number;
  /** Directory for mounts, on a local file system; created if missing. */
  readonly runDir: string;
  /** Device name; a file is called `<name>.raw`. */
  readonly name: string;
  /** Default: auto. */
  readonly mechanism?: RawViewMechanism;
  /** Default: this machine. */
  readonly host?: NbdHost;
  /** Gets the reason why "auto" uses a file although the kernel module is loaded. */
  readonly warn?: (message: string) => void;
  readonly signal: AbortSignal;
}
