// SPDX-License-Identifier: AGPL-3.0-or-later
// The storage's section of storage.cfg, as the directory provider understands it.
import { RequestError } from "../core/index.ts";
import type { VmMechanism } from "../provider/index.ts";

export interface DirectoryConfig {
  readonly path: string;
  readonly vmMechanism: VmMechanism;
  readonly vmMode: "full" | "incremental";
  readonly lxcMode: "tar" | "squashfs";
  readonly compression: "none" | "zlib" | "zstd";
  readonly deviceView: "auto" | "fuse" | "nbd";
  /** Longest silence of a VM's NBD server. */
  readonly nbdTimeoutSeconds: number;
  /** After so many days all of a disk is read, and compared, once more; 0: never. */
  readonly fullReadEveryDays: number;
  /** Whether a restore compares what it reads with the recorded checksums. */
  readonly isRestoreVerified: boolean;
}

/** Option name and its possible values; the first one is the default. */
const CHOICES = {
  "vm-backup-mechanism": ["nbd", "file-handle"],
  "vm-backup-mode": ["full", "incremental"],
  "lxc-backup-mode": ["tar", "squashfs"],
  "dir-compression": ["zstd", "zlib", "none"],
  "dir-device-view": ["auto", "fuse", "nbd"],
} as const;
type Choice = keyof typeof CHOICES;

const VERIFY_RESTORE = "dir-verify-restore";
const NUMBERS = {
  "dir-nbd-timeout": { min: 5, max: 3600, unit: "seconds", default: 300 },
  "dir-full-read-every": { min: 0, max: 3650, unit: "days", default: 30 },
} as const;
/** Options that this provider knows. */
const OWN_OPTIONS: readonly string[] = [...Object.keys(CHOICES), ...Object.keys(NUMBERS), VERIFY_RESTORE];

/** PVE's own options that come with the section; the shim or PVE acts on them. */
const PVE_OPTIONS = new Set([
  "type",
  "path",
  "content",
  "nodes",
  "disable",
  "shared",
  "is_mountpoint",
  "create-base-path",
  "prune-backups",
  "max-protected-backups",
  "digest",
]);

/**
 * Reads the section.
 *
 * @throws RequestError for an unknown option or value: a typo must not pass for a default
 */
export function parseConfig(scfg: Readonly<Record<string, unknown>>): DirectoryConfig {
  for (const name of Object.keys(scfg)) {
    if (!PVE_OPTIONS.has(name) && !OWN_OPTIONS.includes(name)) {
      const known = OWN_OPTIONS.join(", ");
      throw new RequestError(`Cannot use option "${name}" of the storage: it is unknown, expected one of ${known}`);
    }
  }
  const { path } = scfg;
  if (typeof path !== "string" || !path.startsWith("/") || path.includes("\0")) {
    throw new RequestError(`Cannot use the storage path ${JSON.stringify(path)}: expected an absolute path`);
  }
  return {
    path,
    vmMechanism: choose(scfg, "vm-backup-mechanism"),
    vmMode: choose(scfg, "vm-backup-mode"),
    lxcMode: choose(scfg, "lxc-backup-mode"),
    compression: choose(scfg, "dir-compression"),
    deviceView: choose(scfg, "dir-device-view"),
    nbdTimeoutSeconds: integer(scfg, "dir-nbd-timeout"),
    fullReadEveryDays: integer(scfg, "dir-full-read-every"),
    isRestoreVerified: verifyRestore(scfg),
  };
}

function choose<C extends Choice>(scfg: Readonly<Record<string, unknown>>, option: C): (typeof CHOICES)[C][number] {
  const values: readonly string[] = CHOICES[option];
  const value = scfg[option] ?? values[0];
  if (typeof value !== "string" || !values.includes(value)) {
    throw new RequestError(
      `Cannot use "${option}" of the storage: its value is ${JSON.stringify(value)}, expected one of ${values.join(", ")}`,
    );
  }
  return value as (typeof CHOICES)[C][number];
}

/** PVE passes a boolean as 1 or 0, and as text where it has not parsed it. */
function verifyRestore(scfg: Readonly<Record<string, unknown>>): boolean {
  const value = scfg[VERIFY_RESTORE] ?? 1;
  if (value !== 1 && value !== 0 && value !== "1" && value !== "0") {
    throw new RequestError(
      `Cannot use "${VERIFY_RESTORE}" of the storage: its value is ${JSON.stringify(value)}, expected 0 or 1`,
    );
  }
  return Number(value) === 1;
}

/** PVE passes the numbers in its configuration as text. */
function integer(scfg: Readonly<Record<string, unknown>>, option: keyof typeof NUMBERS): number {
  const { min, max, unit, default: usual } = NUMBERS[option];
  const value = scfg[option] ?? usual;
  const number = typeof value === "string" && /^[0-9]{1,9}$/.test(value) ? Number(value) : value;
  if (typeof number !== "number" || !Number.isInteger(number) || number < min || number > max) {
    throw new RequestError(
      `Cannot use "${option}" of the storage: its value is ${JSON.stringify(value)}, expected a number of ${unit} from ${min} to ${max}`,
    );
  }
  return number;
}
