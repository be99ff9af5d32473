// SPDX-License-Identifier: AGPL-3.0-or-later
// What a refusal by QEMU's NBD server means for the backup of a disk, worded for the task log.
import { firstError, HostError } from "../core/index.ts";
import { NbdConnectionError, NbdServerError } from "../nbd/index.ts";

/** QEMU refused to give what it offered. */
class SourceReadError extends HostError {
  override readonly code = "SOURCE";
}

/**
 * When QEMU cannot keep a block's old content, it breaks the backup's snapshot, not the guest: every read from then on
 * fails with EACCES. NBD defines no such error, so the client sees EINVAL. Other causes of EINVAL are ruled out: no
 * request is outside the disk, unaligned to its block size, or outside the dirty ranges.
 * Source: QEMU block/copy-before-write.c, on-cbw-error; nbd/server.c, system_errno_to_nbd_errno().
 */
const BROKEN_SNAPSHOT = new Set(["EINVAL", "ERRNO_13"]);

/** @returns `error` itself, unless it is a refusal to give for `device` what was offered */
export function explainRefusal(device: string, error: unknown): unknown {
  if (!(error instanceof NbdServerError)) return error;
  if (BROKEN_SNAPSHOT.has(error.errno)) return brokenSnapshot(device, error.errno, error);
  const options = error.errno === "EIO" ? { cause: error, hint: DISK_HINT } : { cause: error };
  return new SourceReadError(`Cannot read "${device}": ${lowerFirst(error.message)}`, options);
}

/** @returns `error` itself, unless it is a refusal to give the bitmap of `device`; that involves no read of data */
export function explainMapRefusal(device: string, error: unknown): unknown {
  if (!(error instanceof NbdServerError)) return error;
  return new SourceReadError(`Cannot read the block map of "${device}": ${lowerFirst(error.message)}`, {
    cause: error,
  });
}

/** The wording; a FUSE file reports this as EINVAL or EACCES. */
export function brokenSnapshot(device: string, errno: string, cause: unknown): SourceReadError {
  return new SourceReadError(
    `Cannot read "${device}": QEMU gave up the snapshot of the disk during the backup (${errno}), ` +
      "as it does when the fleecing storage is full or too slow",
    { cause, hint: "make room on the fleecing storage; nothing is lost, the next backup holds all changes" },
  );
}

const DISK_HINT = "the VM's disk or its fleecing image has a read error; see the kernel log of the node";

/** Except for the first letter of an abbreviation. */
const lowerFirst = (text: string): string =>
  /^[A-Z]{2}/.test(text) ? text : `${text.charAt(0).toLowerCase()}${text.slice(1)}`;

/** The NBD server is part of the guest's QEMU: if one is gone, so is the other. */
const SERVER_GONE = new Set(["ECONNRESET", "EPIPE", "ECONNREFUSED", "ENOENT"]);

/** The connection to QEMU is lost, or no server listens. */
class SourceGoneError extends HostError {
  override readonly code = "SOURCE";
}

/** @returns `thrown` itself, unless it says that QEMU's NBD server is gone or hangs */
export function explainLoss(vmid: number, device: string, thrown: unknown): unknown {
  const error = firstError(thrown); // if QEMU is gone, closing what was opened may fail, too
  if (!(error instanceof NbdConnectionError)) return thrown;
  if (error.errno === "ETIMEDOUT") {
    return new SourceGoneError(
      `Cannot back up "${device}": the QEMU process of VM ${vmid} hangs, ${lowerFirst(error.message)}`,
      { cause: error, hint: "how long QEMU may be silent is dir-nbd-timeout of the storage; nothing is lost" },
    );
  }
  if (!SERVER_GONE.has(error.errno ?? "")) return thrown;
  return new SourceGoneError(
    `Cannot back up "${device}": the QEMU process of VM ${vmid} ended its NBD server during the backup (${error.errno})`,
    {
      cause: error,
      hint:
        `see with "qm status ${vmid}" whether the VM still runs, and in the node's journal why not; ` +
        "nothing is lost, the next backup holds all changes",
    },
  );
}
