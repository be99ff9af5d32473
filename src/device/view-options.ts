// SPDX-License-Identifier: AGPL-3.0-or-later
// What a raw view is, whichever way it is made.
import type { RegularFile } from "../host/index.ts";
import type { NbdHost } from "./nbd-host.ts";

/**
 * "nbd": a /dev/nbdX. "fuse": a file, by qemu-storage-daemon ("fuse-export") or nbdfuse ("nbdfuse"), whichever this
 * machine has. "auto": /dev/nbdX where the kernel module is loaded and a node is free, else a file.
 */
export type RawViewMechanism = "auto" | "nbd" | "fuse" | "fuse-export" | "nbdfuse";

/** A raw file or block device that exists until it is disposed. */
export interface RawView extends AsyncDisposable {
  readonly path: string;
  readonly sizeBytes: number;
  /**
   * What has become of the server, if it no longer serves. A reader need not have noticed: a node or a file without
   * a server can have the size 0, and "qemu-img convert -n" copies nothing from it and succeeds.
   */
  findTrouble(): Promise<string | undefined>;
}

export interface RawViewOptions {
  /**
   * Open qcow2 files, top first, borrowed as long as the view is there. Their headers' backing names are not looked at.
   */
  readonly chain: readonly RegularFile[];
  /** Size it must have: the guest disk's, a multiple of 512. */
  readonly sizeBytes: number;
  /** Folder for mounts, on a local file system; made if missing. */
  readonly runDir: string;
  /** Device name; a file is called `<name>.raw`. */
  readonly name: string;
  /** Default: auto. */
  readonly mechanism?: RawViewMechanism;
  /** Default: this machine. */
  readonly host?: NbdHost;
  /** Told why "auto" takes a file although the kernel module is loaded. */
  readonly warn?: (message: string) => void;
  readonly signal: AbortSignal;
}
