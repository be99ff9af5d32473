// SPDX-License-Identifier: AGPL-3.0-or-later
// Processes and hosts by what is unique about them: a pid alone is reused by later processes.
import { createHash } from "node:crypto";
import { readFile, readlink } from "node:fs/promises";
import { hostname } from "node:os";

export interface ProcessIdentity {
  readonly bootId: string;
  readonly pid: number;
  /** Clock ticks after boot, as /proc prints it. */
  readonly startTime: string;
}

let bootId: string | undefined;
let hostId: string | undefined;

export async function readBootId(): Promise<string> {
  bootId ??= (await readFile("/proc/sys/kernel/random/boot_id", "latin1")).trim();
  return bootId;
}

/**
 * Tells hosts apart. The host name is part of it: cloned machines often share their machine id, and a lock of one must
 * not look like an old lock of the other. The pid namespace (the same for all hosts outside of containers) is part of
 * it, too: a process that cannot be seen from here must not be called dead.
 */
export async function readHostId(): Promise<string> {
  if (hostId === undefined) {
    const machineId = await readFile("/etc/machine-id", "latin1").catch(() => "");
    const pids = await readlink("/proc/self/ns/pid").catch(() => "");
    const text = `pve-backup-host ${machineId.trim()} ${hostname()} ${pids}`;
    hostId = createHash("sha256").update(text).digest("hex").slice(0, 32);
  }
  return hostId;
}

/** A running process of this host; undefined if there is none, or only its zombie. */
export async function readProcess(pid: number): Promise<ProcessIdentity | undefined> {
  const stat = await readFile(`/proc/${pid}/stat`, "latin1").catch(() => undefined);
  // The command name is in parentheses and may contain anything, even ")".
  const fields = stat?.slice(stat.lastIndexOf(")") + 2).split(" ");
  const state = fields?.[0];
  const startTime = fields?.[19]; // field 22 of proc(5); this list starts at field 3
  if (startTime === undefined || state === "Z" || state === "X") return undefined;
  return { bootId: await readBootId(), pid, startTime };
}

export function isSameProcess(a: ProcessIdentity, b: ProcessIdentity): boolean {
  return a.bootId === b.bootId && a.pid === b.pid && a.startTime === b.startTime;
}

/** True if exactly this process still runs on this host. */
export async function isRunning(process: ProcessIdentity): Promise<boolean> {
  const now = await readProcess(process.pid);
  return now !== undefined && isSameProcess(now, process);
}
