// SPDX-License-Identifier: AGPL-3.0-or-later
// Locks of others on the share: who counts as dead, and what is no lock at all.
import { execFileSync, spawnSync } from "node:child_process";
import { existsSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import { mkdir, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import type { LockTiming } from "../../src/store/index.ts";
import { onRename, resetFileHooks, takeLinksAway } from "../support/fault/file-hooks.ts";
import {
  ANOTHER_BOOT,
  ANOTHER_HOST,
  encodeLock,
  guestLockOf,
  keepAlive,
  type LockJson,
  sampleLock,
  writeLock,
} from "../support/fault/lock-files.ts";
import { TestNode } from "../support/node/test-node.ts";
import { expectRestores, mustBackUp, never, startGuest, VMID } from "../support/vm/vm-rules.ts";

/** Slow enough that a busy machine does not make a young lock old. */
const TIMING: LockTiming = { heartbeatMs: 50, staleMs: 2_000, observeMs: 500 };
/** As in production: whatever is watched takes longer than any of these tests. */
const SLOW: LockTiming = { heartbeatMs: 10_000, staleMs: 120_000, observeMs: 60_000 };
const AT_ONCE_MS = 5_000;

afterEach(resetFileHooks);

interface Outcome {
  /** Message and hint of the refusal; undefined if the lock was got. */
  readonly refusal: string | undefined;
  readonly tookMs: number;
}

/** backup_init of a job that goes no further. */
async function tryJob(node: TestNode, lockTiming: LockTiming): Promise<Outcome> {
  await using provider = node.provider({}, { lockTiming });
  const startMs = performance.now();
  const refusal = await provider.backup.backupInit(VMID, "qemu", 5000, never).then(
    () => undefined,
    (error: { message: string; hint?: string }) => [error.message, error.hint ?? ""].join("; "),
  );
  const tookMs = performance.now() - startMs;
  await provider.backup.backupCleanup(VMID, "qemu", false, "it goes no further", never);
  return { refusal, tookMs };
}

async function makeOld(file: string, ageMs: number): Promise<void> {
  const seconds = (Date.now() - ageMs) / 1000;
  utimesSync(file, seconds, seconds);
}

describe("a lock with our own host id and another boot id, as of a clone of this node,", () => {
  const cloned = (record: LockJson): LockJson => ({
    ...record,
    uuid: "11111111-2222-4333-8444-555555555555",
    process: { ...record.process, bootId: ANOTHER_BOOT },
  });

  it("is respected while its heartbeat moves", async () => {
    await using node = await TestNode.create();
    const lock = guestLockOf(node, VMID);
    await writeLock(lock, cloned(await sampleLock(node)));
    using _holder = keepAlive(lock);
    expect((await tryJob(node, TIMING)).refusal).toMatch(/^Cannot lock guest 100: it is in use by process \d+ on /);
    expect(await readFile(lock, "utf8")).toContain(ANOTHER_BOOT);
  });

  it("is respected too if it looks old, and its heartbeat moves", async () => {
    await using node = await TestNode.create();
    const lock = guestLockOf(node, VMID);
    await writeLock(lock, cloned(await sampleLock(node)));
    using _holder = keepAlive(lock, { ageMs: 60_000 });
    expect((await tryJob(node, TIMING)).refusal).toMatch(/in use by/);
    expect(await readFile(lock, "utf8")).toContain(ANOTHER_BOOT);
  });

  it("is watched and then broken after its heartbeat has stopped", async () => {
    await using node = await TestNode.create();
    const lock = guestLockOf(node, VMID);
    await writeLock(lock, cloned(await sampleLock(node)));
    const holder = keepAlive(lock);
    holder.stop();
    expect((await tryJob(node, TIMING)).refusal).toMatch(/in use by/); // too young to be judged
    await sleep(TIMING.staleMs * 1.25);
    const { refusal, tookMs } = await tryJob(node, TIMING);
    expect(refusal).toBeUndefined();
    expect(tookMs).toBeGreaterThanOrEqual(TIMING.observeMs);
    expect(existsSync(lock)).toBe(false);
  });
});

describe("a lock of this boot whose process is gone", () => {
  it("is broken at once", async () => {
    await using node = await TestNode.create();
    const { pid } = spawnSync("true");
    const record = await sampleLock(node);
    const lock = guestLockOf(node, VMID);
    await writeLock(lock, { ...record, process: { ...record.process, pid } });
    const { refusal, tookMs } = await tryJob(node, SLOW);
    expect(refusal).toBeUndefined();
    expect(tookMs).toBeLessThan(AT_ONCE_MS);
  });
});

describe("what stands at the place of a lock and is none", () => {
  const things: ReadonlyArray<readonly [string, RegExp, (lock: string, node: TestNode) => Promise<unknown>]> = [
    ["a folder", /folder|directory/, (lock) => mkdir(lock)],
    ["a folder with something in it", /folder|directory/, (lock) => mkdir(path.join(lock, "x"), { recursive: true })],
    ["a link to nothing", /symbolic link/, (lock) => symlink("/nowhere/at/all", lock)],
    ["a link to a lock", /symbolic link/, linkToLock],
    ["a FIFO", /FIFO|pipe/, async (lock) => execFileSync("mkfifo", [lock])],
  ];

  it.each(things)("%s fails the job at once, and is named", async (_what, named, make) => {
    await using node = await TestNode.create();
    const lock = guestLockOf(node, VMID);
    await mkdir(path.dirname(lock), { recursive: true });
    await make(lock, node);
    for (const ageMs of [0, 3 * SLOW.staleMs]) {
      if (ageMs > 0) execFileSync("touch", ["-h", "-d", "1 day ago", lock]); // age does not make it a lock
      const { refusal, tookMs } = await tryJob(node, SLOW);
      expect(refusal).toMatch(/^Cannot [^\n]*$/);
      expect(refusal).toContain(lock);
      expect(refusal).toMatch(named);
      expect(refusal).toMatch(/remove/);
      expect(tookMs).toBeLessThan(AT_ONCE_MS);
    }
    await rm(lock, { recursive: true });
    expect((await tryJob(node, SLOW)).refusal).toBeUndefined();
  });
});

async function linkToLock(lock: string, node: TestNode): Promise<void> {
  const elsewhere = path.join(node.dir, "lock-elsewhere");
  await writeFile(elsewhere, encodeLock(await sampleLock(node)));
  await symlink(elsewhere, lock);
}

describe("a reader's lock of another host that looks two days old", () => {
  const TWO_DAYS_MS = 2 * 24 * 60 * 60 * 1000;
  const UUID = "11111111-2222-4333-8444-555555555555";

  /** A guest with one backup, and the lock of somebody who reads it. */
  async function readElsewhere(node: TestNode): Promise<string> {
    const lock = path.join(node.storePath, String(VMID), ".locks", `qemu-1000.shared-${UUID}`);
    await writeLock(lock, { ...(await sampleLock(node)), uuid: UUID, hostId: ANOTHER_HOST, hostname: "pve2" });
    await makeOld(lock, TWO_DAYS_MS);
    return lock;
  }

  it("survives the next backup's sweep while its heartbeat moves", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    const lock = await readElsewhere(node);
    using _reader = keepAlive(lock, { ageMs: TWO_DAYS_MS });
    expect((await tryJob(node, TIMING)).refusal).toBeUndefined();
    expect(existsSync(lock)).toBe(true);
    await expectRestores(node, first); // two readers do not disturb each other
    expect(existsSync(lock)).toBe(true);
  });

  it("is removed when it does not move", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    const lock = await readElsewhere(node);
    expect((await tryJob(node, TIMING)).refusal).toBeUndefined();
    expect(existsSync(lock)).toBe(false);
  });
});

describe("on a file system without hard links", () => {
  it("a lock taken meanwhile by another host is put back by the one who broke the dead one before it", async () => {
    await using node = await TestNode.create();
    const lock = guestLockOf(node, VMID);
    const record = await sampleLock(node);
    const { pid } = spawnSync("true");
    await writeLock(lock, { ...record, process: { ...record.process, pid } });
    const other = { ...record, uuid: "11111111-2222-4333-8444-555555555555", hostId: ANOTHER_HOST, hostname: "pve2" };
    takeLinksAway();
    const hasCome = onRename(
      (from) => from.endsWith("/.lock"),
      () => {
        // The other host was quicker: it broke the dead lock, too, and has its own there now.
        rmSync(lock);
        writeFileSync(lock, encodeLock(other));
      },
    );
    const { refusal } = await tryJob(node, SLOW);
    expect(hasCome()).toBe(true);
    expect(refusal).toMatch(/^Cannot lock guest 100: it is in use by process \d+ on pve2 since /);
    expect(JSON.parse(await readFile(lock, "utf8"))).toMatchObject({ uuid: other.uuid, hostname: "pve2" });
    expect(await readdir(path.dirname(lock))).toEqual([".lock"]);
  });
});
