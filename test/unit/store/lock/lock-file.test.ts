// SPDX-License-Identifier: AGPL-3.0-or-later
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readdirSync, rmSync } from "node:fs";
import { mkdir, readdir, readFile, rename, rm, rmdir, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { LockedError, StoreUnavailableError } from "../../../../src/store/errors.ts";
import { PointDamagedError, type Store } from "../../../../src/store/index.ts";
import { breakLock } from "../../../../src/store/lock/lock-file.ts";
import { readLock } from "../../../../src/store/lock/lock-record.ts";
import { type Bundle, buildProgram } from "../../../support/programs/bundle.ts";
import { backup, createLab, editJson, FAST_TIMING, holdChains, type Lab, NEVER, readJson } from "../lab.ts";

let program: Bundle;
beforeAll(async () => {
  program = await buildProgram("test/unit/store/lock/hold-lock.ts");
});
afterAll(() => program[Symbol.asyncDispose]());

interface Holder extends AsyncDisposable {
  readonly child: ChildProcess;
}

/** Starts a process that holds the lock of guest 100, or a reader's lock on `archive`. */
async function startHolder(lab: Lab, archive?: string): Promise<Holder> {
  const args = [program.path, lab.path, lab.root, "100", ...(archive ? [archive] : [])];
  const child = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "inherit"] });
  const [first] = (await Promise.race([once(child.stdout, "data"), once(child, "exit")])) as [Buffer | number];
  expect(String(first)).toBe("held\n");
  return {
    child,
    [Symbol.asyncDispose]: async () => {
      if (child.exitCode !== null || child.signalCode !== null) return;
      const ended = once(child, "exit");
      child.kill("SIGKILL");
      await ended;
    },
  };
}

const lockPath = (lab: Lab): string => join(lab.path, "100/.lock");

/** Makes the lock look like one of another host, last touched `ageMs` ago. */
async function fakeForeignLock(lab: Lab, ageMs: number): Promise<void> {
  const store = await lab.open();
  const lock = await store.lockGuest(100, NEVER);
  const record = await readJson(lockPath(lab));
  await lock[Symbol.asyncDispose]();
  const text = JSON.stringify({ ...record, hostId: "0".repeat(32), hostname: "pve2" });
  await writeFile(lockPath(lab), text);
  const seconds = (Date.now() - ageMs) / 1000;
  await utimes(lockPath(lab), seconds, seconds);
}

describe("Store.lockGuest()", () => {
  it("lets one writer in, names the holder to the other, and frees the lock on dispose", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    {
      await using _held = await store.lockGuest(100, NEVER);
      const error = await store.lockGuest(100, NEVER).catch((thrown: unknown) => thrown);
      expect(error).toBeInstanceOf(LockedError);
      expect(String(error)).toMatch(
        new RegExp(`Cannot lock guest 100: it is in use by process ${process.pid} on \\S+ since \\d{4}-\\d\\d-\\d\\dT`),
      );
      await using _other = await store.lockGuest(101, NEVER);
    }
    await using _again = await store.lockGuest(100, NEVER);
    expect((await readdir(join(lab.path, "100"))).sort()).toEqual([".lock"]);
  });

  it("refuses a path that leads to another folder than the one that was opened", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    await rename(lab.path, `${lab.path}.share`);
    await mkdir(lab.path); // what lies below a mount point
    const log = join(lab.root, "log");
    await writeFile(log, "failed");
    const job = { vmid: 100, type: "qemu", epoch: 1000 } as const;
    for (const attempt of [() => store.lockGuest(100, NEVER), () => store.keepFailedLog(job, log)]) {
      const error: unknown = await attempt().catch((thrown: unknown) => thrown);
      expect(error).toBeInstanceOf(StoreUnavailableError);
      expect(String(error)).toMatch(/another file system is mounted there, or the share is gone$/);
    }
    expect(await readdir(lab.path)).toEqual([]);
    await rm(lab.path, { recursive: true });
    await rename(`${lab.path}.share`, lab.path);
    await using _lock = await store.lockGuest(100, NEVER);
  });

  it("lets exactly one of many at once in", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const results = await Promise.allSettled(Array.from({ length: 20 }, () => store.lockGuest(100, NEVER)));
    const winners = results.filter((one) => one.status === "fulfilled");
    expect(winners).toHaveLength(1);
    for (const winner of winners) await winner.value[Symbol.asyncDispose]();
  });

  it("never breaks the lock of a living process of this host, however old it looks", async () => {
    await using lab = await createLab();
    await using holder = await startHolder(lab);
    holder.child.kill("SIGSTOP"); // no heartbeat any more
    await utimes(lockPath(lab), 1, 1);
    await expect((await lab.open()).lockGuest(100, NEVER)).rejects.toThrow(
      new RegExp(`in use by process ${holder.child.pid} on`),
    );
  });

  it("breaks the lock of a killed process at once", async () => {
    await using lab = await createLab();
    const holder = await startHolder(lab);
    await holder[Symbol.asyncDispose]();
    expect(existsSync(lockPath(lab))).toBe(true);
    const startMs = performance.now();
    const store = await lab.open({ timing: { heartbeatMs: 10_000, staleMs: 120_000, observeMs: 25_000 } });
    await using _lock = await store.lockGuest(100, NEVER);
    expect(performance.now() - startMs).toBeLessThan(20_000);
  });

  it("breaks the lock of a process of this host whose pid is another process now", async () => {
    await using lab = await createLab();
    const store = await lab.open({ timing: { ...FAST_TIMING, heartbeatMs: 60_000 } }); // a beat would write it anew
    const lock = await store.lockGuest(100, NEVER);
    await editJson(lockPath(lab), (record) => Object.assign(record.process as object, { startTime: "1" }));
    await using _next = await store.lockGuest(100, NEVER);
    await lock[Symbol.asyncDispose]();
  });

  it("keeps away from a young lock of another boot of this host: nodes made of one image look like that", async () => {
    await using lab = await createLab();
    const store = await lab.open({ timing: { ...FAST_TIMING, heartbeatMs: 60_000, staleMs: 60_000 } });
    await using _lock = await store.lockGuest(100, NEVER);
    const bootId = "11111111-2222-3333-4444-555555555555";
    await editJson(lockPath(lab), (record) => Object.assign(record.process as object, { bootId }));
    await expect(store.lockGuest(100, NEVER)).rejects.toThrow(/in use by process/);
  });

  it("keeps away from a young lock of another host", async () => {
    await using lab = await createLab();
    await fakeForeignLock(lab, 100);
    await expect((await lab.open()).lockGuest(100, NEVER)).rejects.toThrow(/in use by process \d+ on pve2 since/);
  });

  it("breaks an old lock of another host that does not move while it is watched", async () => {
    await using lab = await createLab();
    await fakeForeignLock(lab, 10_000);
    await using _lock = await (await lab.open()).lockGuest(100, NEVER);
    expect((await readJson(lockPath(lab))).hostname).not.toBe("pve2");
  });

  it("keeps away from an old lock of another host that shows a heartbeat while it is watched", async () => {
    await using lab = await createLab();
    await fakeForeignLock(lab, 10_000);
    const acquiring = (await lab.open({ timing: { heartbeatMs: 20, staleMs: 400, observeMs: 400 } })).lockGuest(
      100,
      NEVER,
    );
    const outcome = acquiring.catch((thrown: unknown) => thrown);
    await sleep(150);
    await editJson(lockPath(lab), (record) => {
      record.heartbeat = 7;
    });
    expect(await outcome).toBeInstanceOf(LockedError);
  });

  it("treats a lock file without sense as somebody's until it is old", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    await mkdir(join(lab.path, "100"));
    await writeFile(lockPath(lab), "");
    await expect(store.lockGuest(100, NEVER)).rejects.toThrow(/an unknown process/);
    await utimes(lockPath(lab), 1, 1);
    await using _lock = await store.lockGuest(100, NEVER);
  });

  it("stops watching when it is cancelled", async () => {
    await using lab = await createLab();
    await fakeForeignLock(lab, 10_000);
    const store = await lab.open({ timing: { heartbeatMs: 20, staleMs: 400, observeMs: 60_000 } });
    const controller = new AbortController();
    const outcome = store.lockGuest(100, controller.signal).catch((thrown: unknown) => thrown);
    setTimeout(() => controller.abort(new LockedError("enough")), 50);
    expect(String(await outcome)).toMatch(/enough/);
  });

  it("shows that it lives by a heartbeat in place", async () => {
    await using lab = await createLab();
    await using lock = await (await lab.open()).lockGuest(100, NEVER);
    const first = await readLock(lock.folder, ".lock");
    await expect
      .poll(async () => (await readLock(lock.folder, ".lock"))?.record?.heartbeat, { timeout: 30_000 })
      .toBeGreaterThan(1);
    expect((await readLock(lock.folder, ".lock"))?.record?.uuid).toBe(first?.record?.uuid);
    expect(lock.lost.aborted).toBe(false);
  });

  it("finds out that its lock is gone", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    await using lock = await store.lockGuest(100, NEVER);
    await rm(lockPath(lab));
    await using _thief = await store.lockGuest(100, NEVER);
    await expect.poll(() => lock.lost.aborted, { timeout: 30_000 }).toBe(true);
    await expect(lock.assertHeld()).rejects.toThrow(
      /Cannot continue with guest 100: its lock was taken over by process/,
    );
  });

  it("does not remove a lock that is not its own any more", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const lock = await store.lockGuest(100, NEVER);
    await rm(lockPath(lab));
    await using thief = await store.lockGuest(100, NEVER);
    await lock[Symbol.asyncDispose]();
    await thief.assertHeld();
  });
});

describe("breakLock()", () => {
  it("puts back a lock that is not the one it was told to break", async () => {
    await using lab = await createLab();
    await using lock = await (await lab.open({ timing: SLOW })).lockGuest(100, NEVER);
    const content = await readFile(lockPath(lab));
    const seen = await readLock(lock.folder, ".lock");
    if (seen?.record === undefined) throw new Error("no lock");
    await breakLock(lock.folder, ".lock", {
      ...seen,
      record: { ...seen.record, uuid: "11111111-2222-3333-4444-555555555555" },
    });
    expect(await readFile(lockPath(lab))).toEqual(content);
    await lock.assertHeld();
    await breakLock(lock.folder, ".lock", seen);
    expect(existsSync(lockPath(lab))).toBe(false);
    expect(await readdir(join(lab.path, "100"))).toEqual([]);
  });
});

const SLOW = { heartbeatMs: 10_000, staleMs: 120_000, observeMs: 25_000 };

describe("locks on points", () => {
  const makeChain = async (store: Store) => {
    const full = await backup(store, { epoch: 1000 });
    const top = await backup(store, { epoch: 2000, base: full });
    const alone = await backup(store, { epoch: 3000 });
    return { full, top, alone };
  };

  it("keep removers from the whole chain of a reader, and from nothing else", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const { full, top, alone } = await makeChain(store);
    {
      await using _reader = await holdChains(store, top, NEVER);
      await using _second = await holdChains(store, top, NEVER);
      await expect(store.lockPointExclusive(top, NEVER)).rejects.toThrow(/qemu-2000": it is being read by process/);
      await expect(store.lockPointExclusive(full, NEVER)).rejects.toThrow(LockedError);
      await using _remover = await store.lockPointExclusive(alone, NEVER);
    }
    await using _remover = await store.lockPointExclusive(full, NEVER);
    await expect(holdChains(store, top, NEVER)).rejects.toThrow(/qemu-1000": it is being removed by process/);
    await expect(store.lockPointExclusive(full, NEVER)).rejects.toThrow(LockedError);
  });

  it("are refused by name where what stands in their place is none", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const { full, top } = await makeChain(store);
    const locks = join(lab.path, "100/.locks");
    for (const [name, lock] of [
      ["qemu-1000.exclusive", () => holdChains(store, top)],
      ["qemu-1000.shared-x", () => store.lockPointExclusive(full, NEVER)],
    ] as const) {
      await mkdir(join(locks, name), { recursive: true });
      await expect(lock()).rejects.toMatchObject({
        message: `Cannot lock "backup/100/qemu-1000": "${join(locks, name)}" is not a lock: it is a directory, not a file`,
        hint: "this software did not create it: remove it",
      });
      await rmdir(join(locks, name));
      await using _lock = await lock();
    }
  });

  it("leave no file behind, also when they fail", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const { full, top } = await makeChain(store);
    {
      await using _reader = await holdChains(store, top, NEVER);
      await store.lockPointExclusive(full, NEVER).catch(() => undefined);
    }
    {
      await using _remover = await store.lockPointExclusive(full, NEVER);
      await holdChains(store, top, NEVER).catch(() => undefined);
    }
    expect(await readdir(join(lab.path, "100/.locks"))).toEqual([]);
  });

  it("of a killed reader count no longer, and are swept by the next backup", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const { full, alone } = await makeChain(store);
    const reader = await startHolder(lab, "100/qemu-2000");
    await expect(store.lockPointExclusive(full, NEVER)).rejects.toThrow(LockedError);
    await reader[Symbol.asyncDispose]();
    expect((await readdir(join(lab.path, "100/.locks"))).length).toBe(1);
    await using _living = await holdChains(store, alone, NEVER);
    await backup(store, { epoch: 4000 });
    expect(await readdir(join(lab.path, "100/.locks"))).toEqual([expect.stringMatching(/^qemu-3000\.shared-/)]);
    await using _remover = await store.lockPointExclusive(full, NEVER);
  });

  it("are refused if a part of the chain went between looking and locking", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const { full, top } = await makeChain(store);
    const locks = join(lab.path, "100/.locks");
    const { signal } = new AbortController();
    // The store asks the signal before each step: the first lock is there, the second look is not yet.
    Object.defineProperty(signal, "throwIfAborted", {
      value: () => {
        const isLocked = existsSync(locks) && readdirSync(locks).some((name) => name.includes(".shared-"));
        if (isLocked) rmSync(full.path, { recursive: true, force: true });
      },
    });
    await expect(holdChains(store, top, signal)).rejects.toThrow(
      /qemu-1000": it was removed or replaced while it was in use/,
    );
    expect(await readdir(locks)).toEqual([]);
  });

  it("are refused for a chain that is not whole", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const { full, top } = await makeChain(store);
    await rm(full.path, { recursive: true });
    await expect(holdChains(store, top, NEVER)).rejects.toThrow(PointDamagedError);
  });
});
