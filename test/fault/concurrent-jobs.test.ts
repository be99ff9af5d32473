// SPDX-License-Identifier: AGPL-3.0-or-later
// Several jobs at once on one store, each a process of its own as under PVE; and two storages on one path.
import { readdir } from "node:fs/promises";
import { hostname } from "node:os";
import path from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { type BridgeBundle, BridgeProcess, buildBridge } from "../support/bridge/bridge-process.ts";
import { TestNode } from "../support/node/test-node.ts";
import { list } from "../support/vm/vm-job.ts";
import { VmLedger } from "../support/vm/vm-ledger.ts";
import { copyDisks, DISK, MIB, modeOf, never, openJob, refusalOf, startGuest, VMID } from "../support/vm/vm-rules.ts";

const TIMEOUT = { timeout: 120_000 };
const VMS = 8;

let bundle: BridgeBundle;
beforeAll(async () => {
  bundle = await buildBridge();
});
afterAll(() => bundle[Symbol.asyncDispose]());

/** VM 100 and its neighbours. */
async function startGuests(node: TestNode, count: number): Promise<LabGuest[]> {
  return await Promise.all(
    Array.from({ length: count }, async (_, index) => {
      const vmid = VMID + index;
      const disks = [{ device: DISK, sizeBytes: 12 * MIB }];
      const guest = await startGuest(node, { dir: path.join(node.dir, `vm${vmid}`), vmid, disks });
      await guest.write(DISK, 0, seededBytes(vmid, 3 * MIB));
      return guest;
    }),
  );
}

describe("eight VMs on one store", () => {
  it("can be backed up at once, in full and incrementally, and one of them by one job only", TIMEOUT, async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    const guests = await startGuests(node, VMS);
    const jobs = await Promise.all(
      guests.map(async (guest) => {
        return { guest, ledger: new VmLedger(node, guest), bridge: await BridgeProcess.start(bundle, node) };
      }),
    );
    try {
      for (const kind of ["full", "incremental"]) {
        await Promise.all(
          jobs.map(async ({ bridge, guest, ledger }) => {
            await guest.write(DISK, 4 * MIB, seededBytes(`${kind} ${guest.vmid}`, MIB));
            const epoch = ledger.takeEpoch();
            const access = await bridge.openJob(guest, epoch, `${node.dir}/o-${guest.vmid}-${epoch}`);
            expect(access.volumes[DISK]?.["bitmap-mode"]).toBe(kind === "full" ? "new" : "reuse");
            expect(await bridge.copyDisks(guest, access)).toBe(true);
            await access.finish(true);
            await bridge.call("backup_cleanup", { vmid: guest.vmid, vmtype: "qemu", success: true });
            await bridge.call("job_cleanup", {});
            ledger.add(`backup/${guest.vmid}/qemu-${epoch}`, access.oracles);
          }),
        );
      }
      for (const { ledger } of jobs) await ledger.expectAllRight();
      const bridges = jobs.map(({ bridge }) => bridge);
      await raceForOneVm(node, bridges, jobs[0]?.ledger as VmLedger);
    } finally {
      for (const { bridge } of jobs) await bridge[Symbol.asyncDispose]();
      for (const guest of guests) await guest[Symbol.asyncDispose]();
    }
  });
});

/** All of them begin a backup of the same VM in the same moment. */
async function raceForOneVm(node: TestNode, bridges: readonly BridgeProcess[], ledger: VmLedger): Promise<void> {
  const epoch = ledger.takeEpoch();
  const inits = await Promise.all(
    bridges.map(async (bridge, at) => {
      const params = { vmid: VMID, vmtype: "qemu", "start-time": epoch + at };
      return await bridge.call("backup_init", params).then(
        () => bridge,
        (error: Error) => error.message,
      );
    }),
  );
  const winners = inits.filter((one) => one instanceof BridgeProcess);
  expect(winners).toHaveLength(1);
  for (const refusal of inits.filter((one) => typeof one === "string")) {
    expect(refusal).toMatch(
      new RegExp(
        `^Cannot lock guest ${VMID}: it is in use by process ${winners[0]?.child.pid} on ${hostname()} since 20`,
      ),
    );
  }
  // The losers' cleanup must not touch what the winner holds.
  for (const bridge of bridges.filter((one) => one !== winners[0])) {
    await bridge.call("backup_cleanup", { vmid: VMID, vmtype: "qemu", success: false, error: "locked" });
    await bridge.call("job_cleanup", {});
  }
  expect(await readdir(path.join(node.storePath, String(VMID)))).toEqual(
    expect.arrayContaining([".lock", expect.stringMatching(/^\.staging-/)]),
  );
  await winners[0]?.call("backup_cleanup", { vmid: VMID, vmtype: "qemu", success: false, error: "enough" });
  for (let at = 0; at < bridges.length; at++) ledger.takeEpoch();
  const before = ledger.newest;
  expect(await ledger.backUp()).toBe(`incremental since ${before}`);
}

/** A backup of the guest through one of several storages that have the same path. @returns its mode */
async function backUpThrough(node: TestNode, guest: LabGuest, ledger: VmLedger, storeid: string): Promise<string> {
  const epoch = ledger.takeEpoch();
  const logStart = node.log.length;
  await using provider = node.provider({}, {}, storeid);
  const { access } = await openJob(provider, guest, { epoch, storeid, oracleDir: `${node.dir}/o-${epoch}` });
  await copyDisks(provider, guest, access);
  await access.finish(true);
  await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never);
  await provider.backup.jobCleanup(never);
  ledger.add(`backup/${VMID}/qemu-${epoch}`, access.oracles);
  return modeOf({ log: node.log.slice(logStart) });
}

describe("two storages on one path", () => {
  it("each builds on its own backups only, with bitmaps of their own", TIMEOUT, async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const ledger = new VmLedger(node, guest);
    const modes: string[] = [];
    for (const [round, storeid] of ["bk", "other", "bk", "other", "other", "bk"].entries()) {
      await guest.write(DISK, (8 + round) * MIB, seededBytes(round, MIB));
      modes.push(await backUpThrough(node, guest, ledger, storeid));
    }
    expect(modes).toEqual([
      "full: first backup",
      "full: first backup",
      "incremental since backup/100/qemu-1000",
      "incremental since backup/100/qemu-1001",
      "incremental since backup/100/qemu-1003",
      "incremental since backup/100/qemu-1002",
    ]);
    await ledger.expectAllRight();
  });

  it("do not back up one VM at once", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const ledger = new VmLedger(node, guest);
    await using first = node.provider();
    await first.backup.backupInit(VMID, "qemu", 5000, never);
    await using second = node.provider({}, {}, "other");
    const refusal = await refusalOf(second.backup.backupInit(VMID, "qemu", 5000, never));
    expect(refusal.message).toMatch(/^Cannot lock guest 100: it is in use by process \d+ on /);
    await second.backup.backupCleanup(VMID, "qemu", false, refusal.message, never);
    await first.backup.backupCleanup(VMID, "qemu", false, "enough", never);
    expect(await backUpThrough(node, guest, ledger, "other")).toBe("full: first backup");
    await ledger.expectAllRight();
  });
});

describe("a clock that jumps back", () => {
  afterEach(() => {
    vi.useRealTimers();
  });

  it("by a day between two jobs and in the middle of one changes nothing but names", TIMEOUT, async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const now = 1_800_000_000;
    vi.useFakeTimers({ toFake: ["Date"], now: now * 1000 });
    const ledger = new VmLedger(node, guest, now);
    await ledger.backUp();
    vi.setSystemTime((now - 86_400) * 1000);
    const early = new VmLedger(node, guest, now - 86_400);
    for (const [volname, oracles] of ledger.points) early.add(volname, oracles);
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    expect(await early.backUp()).toBe(`incremental since backup/100/qemu-${now}`);
    await guest.write(DISK, 9 * MIB, seededBytes("third", MIB));
    const epoch = early.takeEpoch();
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch, oracleDir: `${node.dir}/jump` });
    vi.setSystemTime(1_000_000_000_000);
    await copyDisks(provider, guest, access);
    vi.setSystemTime(1_900_000_000_000);
    await access.finish(true);
    await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never);
    early.add(`backup/100/qemu-${epoch}`, access.oracles);
    await guest.write(DISK, 10 * MIB, seededBytes("fourth", MIB));
    expect(await early.backUp()).toBe(`incremental since backup/100/qemu-${epoch}`);
    await early.expectAllRight();
    expect(await list(node, VMID)).toHaveLength(4);
  });
});
