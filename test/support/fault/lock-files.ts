// SPDX-License-Identifier: AGPL-3.0-or-later
// Locks held by another user of the share: files as a holder writes them, with what a test wants changed.
import { closeSync, futimesSync, openSync, readFileSync, writeFileSync, writeSync } from "node:fs";
import { mkdir, readFile, rm } from "node:fs/promises";
import path from "node:path";
import type { TestNode } from "../node/test-node.ts";
import { never } from "../vm/vm-rules.ts";

export interface LockJson {
  readonly uuid: string;
  readonly hostId: string;
  readonly hostname: string;
  readonly process: { readonly bootId: string; readonly pid: number; readonly startTime: string };
  readonly heartbeat: number;
}

const LOCK_FILE_BYTES = 1024;
export const ANOTHER_BOOT = "99999999-8888-4777-8666-555555555555";
export const ANOTHER_HOST = "0".repeat(32);

export const guestLockOf = (node: TestNode, vmid: number): string => path.join(node.storePath, String(vmid), ".lock");

/** What a holder in this process writes into a guest's lock. */
export async function sampleLock(node: TestNode): Promise<LockJson> {
  const vmid = 999;
  await using provider = node.provider();
  await provider.backup.backupInit(vmid, "qemu", 1, never);
  const record = JSON.parse(await readFile(guestLockOf(node, vmid), "utf8")) as LockJson;
  await provider.backup.backupCleanup(vmid, "qemu", false, "it was for its lock only", never);
  await rm(path.join(node.storePath, String(vmid)), { recursive: true });
  return record;
}

export function encodeLock(record: LockJson): string {
  return `${JSON.stringify(record).padEnd(LOCK_FILE_BYTES - 1)}\n`;
}

export async function writeLock(file: string, record: LockJson): Promise<void> {
  await mkdir(path.dirname(file), { recursive: true });
  writeFileSync(file, encodeLock(record), { mode: 0o600 });
}

interface Beating extends Disposable {
  /** The holder stops writing; its file stays. */
  stop(): void;
}

/** Keeps a lock alive as its holder does: in place, never creating the file again. */
export function keepAlive(file: string, { ageMs = 0, everyMs = 40 } = {}): Beating {
  const beat = (): void => {
    let fd: number;
    try {
      fd = openSync(file, "r+");
    } catch {
      return; // it was removed
    }
    try {
      const record = JSON.parse(readFileSync(fd, "utf8")) as LockJson;
      writeSync(fd, encodeLock({ ...record, heartbeat: record.heartbeat + 1 }), 0);
      // When a server's clock jumps, a living lock looks old.
      const seconds = (Date.now() - ageMs) / 1000;
      if (ageMs > 0) futimesSync(fd, seconds, seconds);
    } finally {
      closeSync(fd);
    }
  };
  beat();
  const timer = setInterval(beat, everyMs);
  const stop = (): void => clearInterval(timer);
  return { stop, [Symbol.dispose]: stop };
}
