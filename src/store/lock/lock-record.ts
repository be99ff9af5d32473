// SPDX-License-Identifier: AGPL-3.0-or-later
// What a lock file contains, and when its holder counts as dead.
import { randomUUID } from "node:crypto";
import type { FileHandle } from "node:fs/promises";
import { hostname } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { environmentError, errnoOf, isUuid } from "../../core/index.ts";
import {
  FileProblem,
  type Folder,
  isRunning,
  isSameProcess,
  type ProcessIdentity,
  readBootId,
  readHostId,
  readProcess,
} from "../../host/index.ts";
import { checkFormat, Fields, parseJson } from "../format/json.ts";
import { TEMP_PREFIX } from "../format/layout.ts";

export interface LockTiming {
  /** How often a holder shows that it is alive. */
  readonly heartbeatMs: number;
  /** A lock of another host may be broken when its file is older than this, by the server's clock... */
  readonly staleMs: number;
  /** ...and did not change while it was watched for this long. */
  readonly observeMs: number;
}

export const LOCK_TIMING: LockTiming = { heartbeatMs: 10_000, staleMs: 120_000, observeMs: 25_000 };

export interface LockRecord {
  readonly uuid: string;
  readonly hostId: string;
  readonly hostname: string;
  readonly process: ProcessIdentity;
  /** The holder's wall clock, ISO 8601; for people only. */
  readonly since: string;
  readonly heartbeat: number;
  /** Directories of the points that a readers' lock covers. */
  readonly points?: readonly string[];
}

/** A lock file as another process sees it. */
export interface SeenLock {
  /** Undefined where the content is unreadable: then only its age can tell. */
  readonly record: LockRecord | undefined;
  readonly mtimeMs: number;
  /** What has the lock's name and is not a file at all: "it is a symbolic link, not a file". Never broken. */
  readonly problem?: string;
}

const LOCK_FORMAT = "pve-backup-host-lock";
const LOCK_VERSION = 1;
/** A record fills whole blocks, with room for the heartbeat: rewriting it in place never changes the length. */
const LOCK_BLOCK_BYTES = 1024;
const HEARTBEAT_ROOM = 16;
const MAX_LOCK_BYTES = 32 * LOCK_BLOCK_BYTES;
/** The longest chain, for a few disks with different chains. */
const MAX_LOCKED_POINTS = 1024;
const MAX_HOSTNAME_CHARS = 255;

/** UUIDs of the locks that this process holds, or is about to. */
export const heldHere = new Set<string>();

export async function createLockRecord(points?: readonly string[]): Promise<LockRecord> {
  const self = await readProcess(process.pid);
  if (self === undefined) throw environmentError("read", `/proc/${process.pid}/stat`, new Error("it is not readable"));
  return {
    uuid: randomUUID(),
    hostId: await readHostId(),
    hostname: hostname().slice(0, MAX_HOSTNAME_CHARS),
    process: self,
    since: new Date().toISOString(),
    heartbeat: 0,
    ...(points === undefined ? {} : { points }),
  };
}

/** JSON in one line, filled up with spaces. */
export function encodeLockRecord(record: LockRecord): Buffer {
  const text = JSON.stringify({ format: LOCK_FORMAT, version: LOCK_VERSION, ...record });
  const blocks = Math.ceil(
    (Buffer.byteLength(text) - String(record.heartbeat).length + HEARTBEAT_ROOM) / LOCK_BLOCK_BYTES,
  );
  return Buffer.from(`${text.padEnd(blocks * LOCK_BLOCK_BYTES - 1)}\n`, "utf8");
}

/** Undefined for anything that is not a complete record. */
export function decodeLockRecord(bytes: Buffer): LockRecord | undefined {
  try {
    const fields = new Fields(parseJson(bytes));
    checkFormat(fields, LOCK_FORMAT, LOCK_VERSION);
    const holder = fields.object("process");
    const points = fields.has("points") ? fields.list("points", MAX_LOCKED_POINTS).map(String) : undefined;
    return {
      uuid: fields.text("uuid", isUuid),
      hostId: fields.text("hostId", /^[0-9a-f]{32}$/),
      hostname: fields.text("hostname", /^[^\n]{0,255}$/),
      process: {
        bootId: holder.text("bootId", isUuid),
        pid: holder.count("pid"),
        startTime: holder.text("startTime", /^[0-9]{1,20}$/),
      },
      since: fields.text("since", /^[0-9TZ:.-]{1,40}$/),
      heartbeat: fields.count("heartbeat"),
      ...(points === undefined ? {} : { points }),
    };
  } catch (error) {
    if (error instanceof FileProblem) return undefined;
    throw error;
  }
}

/** Reads a lock file; undefined if there is none (any more). */
export async function readLock(folder: Folder, name: string): Promise<SeenLock | undefined> {
  try {
    await using file = await folder.openFile(name); // opening asks the server: no attribute cache in between
    return await readLockFrom(file.handle);
  } catch (error) {
    if (errnoOf(error) === "ENOENT" || errnoOf(error) === "ESTALE") return undefined;
    if (error instanceof FileProblem) return { record: undefined, mtimeMs: Number.NaN, problem: error.message };
    throw environmentError("read", folder.pathOf(name), error);
  }
}

/** The same for a lock file that is open already. */
export async function readLockFrom(handle: FileHandle): Promise<SeenLock> {
  const bytes = Buffer.alloc(MAX_LOCK_BYTES);
  const { bytesRead } = await handle.read(bytes, 0, bytes.length, 0);
  const { mtimeMs } = await handle.stat();
  return { record: decodeLockRecord(bytes.subarray(0, bytesRead)), mtimeMs };
}

/**
 * Whether the process table here says anything about the holder. The boot is part of it: nodes made from one image
 * have the same machine id and name. A lock that this host held before it was started again is watched like another
 * host's.
 */
export async function isOfThisHost({ record }: Pick<SeenLock, "record">): Promise<boolean> {
  if (record === undefined || record.hostId !== (await readHostId())) return false;
  return record.process.bootId === (await readBootId());
}

/**
 * True if the holder was a process of this host that is gone, or is this one, which released it. No clock is
 * involved.
 */
export async function isHolderDead({ record }: SeenLock): Promise<boolean> {
  if (record === undefined || !(await isOfThisHost({ record }))) return false;
  if (!(await isRunning(record.process))) return true;
  return record.process.pid === process.pid && !heldHere.has(record.uuid);
}

/**
 * True if the lock may be broken. On this host only the process table decides; a lock of another host must be old by
 * the server's clock and must not move while it is watched. If that clock jumped back, a lock is from the future and
 * says nothing about its age: it is watched for as long as it would have to be old.
 *
 * @throws the abort reason of `signal`
 */
export async function isStale(
  folder: Folder,
  name: string,
  seen: SeenLock,
  timing: LockTiming,
  signal: AbortSignal,
): Promise<boolean> {
  if (await isOfThisHost(seen)) return await isHolderDead(seen);
  const ageMs = (await readServerNowMs(folder)) - seen.mtimeMs;
  if (Math.abs(ageMs) <= timing.staleMs) return false;
  const watchMs = ageMs > 0 ? timing.observeMs : timing.staleMs + timing.observeMs;
  await sleep(watchMs, undefined, { signal }).catch((error: unknown) => {
    signal.throwIfAborted(); // the reason, not Node's own AbortError
    throw error;
  });
  return await isUnmoved(folder, name, seen);
}

/** True if the lock is still as it was seen: its holder gave no sign of life since. */
export async function isUnmoved(folder: Folder, name: string, seen: SeenLock): Promise<boolean> {
  const again = await readLock(folder, name);
  return again !== undefined && isSameLock(seen, again) && again.mtimeMs === seen.mtimeMs;
}

/** The same holding, at the same heartbeat. */
export function isSameLock(a: SeenLock, b: SeenLock): boolean {
  if (a.record === undefined || b.record === undefined) return a.record === b.record && a.mtimeMs === b.mtimeMs;
  return (
    a.record.uuid === b.record.uuid &&
    a.record.heartbeat === b.record.heartbeat &&
    isSameProcess(a.record.process, b.record.process)
  );
}

/** What the file server calls "now": the mtime of a file it has just written. */
async function readServerNowMs(folder: Folder): Promise<number> {
  const name = `${TEMP_PREFIX}${randomUUID()}`;
  try {
    await using handle = await folder.createFile(name);
    await handle.write("now");
    await handle.sync().catch(() => undefined);
    return (await handle.stat()).mtimeMs;
  } catch (error) {
    throw environmentError("write", folder.pathOf(name), error);
  } finally {
    await folder.removeFile(name).catch(() => undefined);
  }
}

/** "process 4711 on pve1 since 2025-01-01T00:00:00.000Z". */
export function describeHolder({ record }: SeenLock): string {
  return record === undefined
    ? "an unknown process (its lock file is not readable)"
    : `process ${record.process.pid} on ${record.hostname} since ${record.since}`;
}
