// SPDX-License-Identifier: AGPL-3.0-or-later
// What the host tells the test machine (a file in it) and what the machine answers (JSON lines on a serial port).

/** A disk of a backup, as it must come back. */
export interface ExpectedDisk {
  readonly device: string;
  readonly sizeBytes: number;
  /** SHA-256 of qemu-img's raw copy, made when the backup began. */
  readonly sha256: string;
}

export interface ExpectedPoint {
  readonly volname: string;
  readonly disks: readonly [ExpectedDisk, ExpectedDisk];
}

/** The content of EXPECTED_FILE. */
export interface Expected {
  /** Oldest first: a full backup, then incremental ones. */
  readonly points: readonly ExpectedPoint[];
}

export type ResultLine =
  | { readonly kind: "plan"; readonly names: readonly string[] }
  | { readonly kind: "result"; readonly name: string; readonly ms: number; readonly error: string | undefined };

/** Places in the test machine. */
export const GUEST_STORE = "/srv/store";
export const EXPECTED_FILE = "/opt/test/expected.json";
export const GUEST_PROGRAM = "/opt/test/guest.mjs";
export const NBD_MODULE_FOLDER = "/modules";
export const STOREID = "bk";
