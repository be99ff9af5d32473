// SPDX-License-Identifier: AGPL-3.0-or-later
// Two hosts on one share: the lock of a living host is never broken, whatever the server's clock says; that of a
// dead one always is; and a host that stood still finds out before it makes anything visible. The other host is a
// process with a host name and pids of its own; its locks beat faster than in a release.
import { readdir, utimes } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import type { DirectoryProvider } from "../../src/directory/directory-provider.ts";
import { Store } from "../../src/store/index.ts";
import { type BridgeBundle, BridgeProcess, buildBridge } from "../support/bridge/bridge-process.ts";
import { HOST_LOCK_TIMING } from "../support/bridge/host-timing.ts";
import { TestNode } from "../support/node/test-node.ts";
import { BareDisk } from "../support/vm/bare-disk.ts";
import { VmLedger } from "../support/vm/vm-ledger.ts";
import { copyDisks, DISK, MIB, never, refusalOf, startGuest, untilCopying, VMID } from "../support/vm/vm-rules.ts";

const TIMEOUT = { timeout: 120_000 };
const PATIENCE_MS = 60_000;
const HOUR_SECONDS = 3600;
const SLOW = MIB;
const IN_USE = /^Cannot lock guest 100: it is in use by process \d+ on other-host since 20[0-9TZ:.-]+$/;

let bundle: BridgeBundle;
beforeAll(async () => {
  bundle = await buildBridge("test/support/bridge/host-bridge.ts");
});
afterAll(() => bundle[Symbol.asyncDispose]());

const thisHost = (node: TestNode): DirectoryProvider => node.provider({}, { lockTiming: HOST_LOCK_TIMING });
const otherHost = (node: TestNode): Promise<BridgeProcess> => BridgeProcess.start(bundle, node, { host: "other-host" });
const lockOf = (node: TestNode): string => path.join(node.storePath, String(VMID), ".lock");

/** Asks until the lock is given; the refusals must all name the other host. */
async function takeOver(provider: DirectoryProvider, epoch: number): Promise<{ refusals: number }> {
  const deadline = performance.now() + PATIENCE_MS;
  for (let refusals = 0; ; refusals++) {
    try {
      await provider.backup.backupInit(VMID, "qemu", epoch, never);
      return { refusals };
    } catch (error) {
      expect((error as Error).message).toMatch(IN_USE);
      if (performance.now() > deadline) throw error;
      await sleep(200);
    }
  }
}

/** The dead host's lock on its base is in nobody's way: who wants to remove the base breaks it. */
async function breakReadersLock(node: TestNode): Promise<void> {
  const locks = path.join(node.storePath, String(VMID), ".locks");
  expect(await readdir(locks)).toEqual([expect.stringMatching(/^qemu-1000\.shared-/)]);
  const { root, storeid, storePath } = node;
  const store = await Store.open({ path: storePath, root, storeid, nodename: "node1", timing: HOST_LOCK_TIMING });
  await using _lock = await store.lockPointExclusive(await store.openPoint("backup/100/qemu-1000", never), never);
  expect(await readdir(locks)).toEqual(["qemu-1000.exclusive"]);
}

/** What the file server's clock did: the lock file carries a time of then. */
async function shiftLock(node: TestNode, seconds: number): Promise<void> {
  const then = Date.now() / 1000 + seconds;
  await utimes(lockOf(node), then, then);
}

describe.concurrent("the lock of a host that lives", () => {
  it("is never broken, also when the server's clock jumps", TIMEOUT, async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await guest.write(DISK, 8 * MIB, seededBytes("more", 4 * MIB));
    const ledger = new VmLedger(node, guest);
    await using bridge = await otherHost(node);
    const epoch = ledger.takeEpoch();
    const access = await bridge.openJob(guest, epoch, `${node.dir}/o1`);
    const copied = bridge.copyDisks(guest, access, SLOW); // some nine seconds, twice as long as a dead one is respected
    await untilCopying(node);
    for (const shift of [0, HOUR_SECONDS, -HOUR_SECONDS, 0]) {
      if (shift !== 0) await shiftLock(node, shift);
      await using provider = thisHost(node);
      expect(await refusalOf(provider.backup.backupInit(VMID, "qemu", 9000, never))).toEqual({
        code: "LOCKED",
        message: expect.stringMatching(IN_USE),
      });
      await provider.backup.backupCleanup(VMID, "qemu", false, "refused", never);
    }
    expect(await copied).toBe(true);
    await access.finish(true);
    ledger.add(`backup/100/qemu-${epoch}`, access.oracles);
    expect(await ledger.backUp()).toBe("incremental since backup/100/qemu-1000");
    await ledger.expectAllRight();
  });
});

describe.concurrent("the lock of a host that died", () => {
  it.each([
    ["", 0],
    [", also when the server's clock has jumped back", HOUR_SECONDS],
  ])("is respected for a while and then broken%s", TIMEOUT, async (_what, shift) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const ledger = new VmLedger(node, guest);
    await ledger.backUp();
    await guest.write(DISK, 8 * MIB, seededBytes("second", 4 * MIB));
    await using bridge = await otherHost(node);
    const access = await bridge.openJob(guest, ledger.takeEpoch(), `${node.dir}/o2`);
    const copied = bridge.copyDisks(guest, access, SLOW);
    await untilCopying(node);
    await bridge.end("SIGKILL");
    expect(await copied).toBe(false);
    await access.finish(false);
    if (shift !== 0) await shiftLock(node, shift);
    await using provider = thisHost(node);
    const { refusals } = await takeOver(provider, ledger.takeEpoch());
    if (shift === 0) expect(refusals).toBeGreaterThan(0);
    await provider.backup.backupCleanup(VMID, "qemu", false, "enough", never);
    await breakReadersLock(node);
    await ledger.expectSettled(); // what else the dead host left was swept
    expect(await ledger.backUp()).toBe("incremental since backup/100/qemu-1000");
    await ledger.expectAllRight();
  });
});

describe.concurrent("a host that stood still until its lock was broken", () => {
  it.each([
    ["while the other one still works", false],
    ["when the other one is done", true],
  ])("makes nothing visible when it goes on %s", TIMEOUT, async (_when, isDone) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await using disk = await BareDisk.start(`${node.dir}/bare`, DISK, seededBytes("bare", 8 * MIB));
    const ledger = new VmLedger(node, guest);
    await ledger.backUp();
    await using bridge = await otherHost(node);
    const { size, nbdPath } = disk.volume("none");
    await bridge.call("backup_init", { vmid: VMID, vmtype: "qemu", "start-time": 5000 });
    const copied = refusalOf(
      bridge.call("backup_vm", {
        vmid: VMID,
        "guest-config": Buffer.from("name: other\n").toString("base64"),
        volumes: { [DISK]: { size, "bitmap-mode": "none", "nbd-path": nbdPath } },
        info: { "bandwidth-limit": 2 * MIB },
      }),
    );
    await untilCopying(node);
    const pid = await bridge.nodePid();
    process.kill(pid, "SIGSTOP");
    const epoch = ledger.takeEpoch();
    await using provider = thisHost(node);
    await takeOver(provider, epoch);
    const modes = await provider.backup.backupVmQueryIncremental(VMID, guest.devices, never);
    const access = await guest.openBackup({ modes, oracleDir: `${node.dir}/mine` });
    if (!isDone) process.kill(pid, "SIGCONT");
    const refused = isDone ? undefined : await copied;
    await copyDisks(provider, guest, access);
    await access.finish(true);
    await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never);
    ledger.add(`backup/100/qemu-${epoch}`, access.oracles);
    if (isDone) process.kill(pid, "SIGCONT");
    const { message } = refused ?? (await copied);
    expect(message).toMatch(
      isDone
        ? /^Cannot continue with guest 100: its lock file is gone$/
        : new RegExp(`^Cannot continue with guest 100: its lock was taken over by process ${process.pid} on `),
    );
    await bridge.call("backup_cleanup", { vmid: VMID, vmtype: "qemu", success: false, error: message });
    await ledger.expectSettled();
    expect(await ledger.backUp()).toBe(`incremental since backup/100/qemu-${epoch}`);
    await ledger.expectAllRight();
  });
});
