// SPDX-License-Identifier: AGPL-3.0-or-later
// The bitmap belongs to a QEMU process, not to a store: where the two may have parted, the backup is full.
import { cp, mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { list } from "../support/vm/vm-job.ts";
import { DISK, expectRestores, MIB, modeOf, mustBackUp, startGuest, VMID } from "../support/vm/vm-rules.ts";

const at = (epoch: number): string => `backup/100/qemu-${epoch}`;

describe("after a rollback with RAM, which brings an old bitmap back,", () => {
  it("the next backup is full and right", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    const state = await guest.saveState();
    await guest.write(DISK, 8 * MIB, seededBytes("lost", MIB));
    await mustBackUp(node, guest, { epoch: 2000 });
    await guest.rollbackWithRam(state);
    expect((await guest.bitmap(DISK))?.dirtyBytes).toBe(0); // it says: nothing changed
    const { job, ...third } = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(job)).toBe("full: vmgenid changed (rollback)");
    await expectRestores(node, third);
  });

  it("so it is for a guest without vmgenid, whose process is another one", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node, { vmgenid: null });
    await mustBackUp(node, guest, { epoch: 1000 });
    const state = await guest.saveState();
    await guest.write(DISK, 8 * MIB, seededBytes("lost", MIB));
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe(`incremental since ${at(1000)}`);
    await guest.rollbackWithRam(state);
    const { job, ...third } = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(job)).toBe("full: no vmgenid and QEMU was restarted");
    await expectRestores(node, second, third);
  });
});

describe("a guest without vmgenid", () => {
  it("is incremental within one process and full after a restart", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node, { vmgenid: null });
    await mustBackUp(node, guest, { epoch: 1000 });
    expect((await mustBackUp(node, guest, { epoch: 2000 })).job.modes).toEqual(new Map([[DISK, "use"]]));
    await guest.restart();
    const { job } = await mustBackUp(node, guest, { epoch: 3000 });
    expect(job.modes).toEqual(new Map([[DISK, "new"]]));
    expect(modeOf(job)).toBe("full: no vmgenid and QEMU was restarted");
  });
});

describe("another disk at the storage's path", () => {
  it("makes full backups as the disks are rotated, and each disk restores alone", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const shelf = `${node.dir}/shelf`;
    await mkdir(shelf);
    const oracles = new Map<string, Awaited<ReturnType<typeof mustBackUp>>>();
    const night = async (epoch: number): Promise<string> => {
      await guest.write(DISK, (epoch / 1000) * MIB, seededBytes(epoch, MIB));
      const done = await mustBackUp(node, guest, { epoch });
      oracles.set(done.volname, done);
      return modeOf(done.job);
    };
    const rotate = async (): Promise<void> => {
      await rename(node.storePath, `${shelf}/x`);
      await rename(`${shelf}/y`, node.storePath).catch(() => mkdir(node.storePath));
      await rename(`${shelf}/x`, `${shelf}/y`);
    };
    expect(await night(1000)).toBe("full: first backup");
    expect(await night(2000)).toBe(`incremental since ${at(1000)}`);
    await rotate();
    expect(await night(3000)).toBe("full: the last backup through this storage is not here");
    await rotate();
    expect(await night(4000)).toBe("full: the last backup through this storage is not here");
    expect(await night(5000)).toBe(`incremental since ${at(4000)}`);
    const here = await list(node, VMID);
    expect(here).toEqual([1000, 2000, 4000, 5000].map(at));
    for (const volname of here) await expectRestores(node, oracles.get(volname) as never);
  });

  it("makes a full backup after a night for which the share was away", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await rename(node.storePath, `${node.dir}/share`);
    await mkdir(node.storePath); // what lies below the mount point takes the backup
    await guest.write(DISK, 8 * MIB, seededBytes("that night", MIB));
    await mustBackUp(node, guest, { epoch: 2000 });
    await rm(node.storePath, { recursive: true });
    await rename(`${node.dir}/share`, node.storePath);
    const { job, ...third } = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(job)).toBe("full: the last backup through this storage is not here");
    await expectRestores(node, third);
  });

  it("makes a full backup on a store that was put back to an older state", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await cp(node.storePath, `${node.dir}/old`, { recursive: true });
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    await mustBackUp(node, guest, { epoch: 2000 });
    await rm(node.storePath, { recursive: true });
    await rename(`${node.dir}/old`, node.storePath);
    const { job, ...third } = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(job)).toBe("full: the last backup through this storage is not here");
    await expectRestores(node, third);
  });
});

describe("another cluster on the same share", () => {
  it("makes the next backup here full", async () => {
    await using here = await TestNode.create();
    await using there = await TestNode.create({ path: here.storePath });
    await using guest = await startGuest(here);
    await using namesake = await startGuest(there);
    await mustBackUp(here, guest, { epoch: 1000 });
    await guest.write(DISK, 8 * MIB, seededBytes("here", MIB));
    await namesake.write(DISK, 2 * MIB, seededBytes("there", MIB));
    const foreign = await mustBackUp(there, namesake, { epoch: 2000 });
    expect(modeOf(foreign.job)).toBe("full: there is no record here of a last backup through this storage");
    const { job, ...third } = await mustBackUp(here, guest, { epoch: 3000 });
    expect(modeOf(job)).toBe("full: qemu-2000 was made through this storage since, and is not recorded here");
    await expectRestores(here, foreign, third);
  });
});

describe("a clock that jumped back", () => {
  it("does not change which point is the newest", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const points = [];
    for (const [epoch, mode] of [
      [5000, "full: first backup"],
      [1000, `incremental since ${at(5000)}`],
      [9000, `incremental since ${at(1000)}`],
      [2000, `incremental since ${at(9000)}`],
    ] as const) {
      await guest.write(DISK, (epoch / 1000) * 2 * MIB, seededBytes(epoch, MIB));
      const point = await mustBackUp(node, guest, { epoch });
      expect(modeOf(point.job)).toBe(mode);
      points.push(point);
    }
    await expectRestores(node, ...points);
  });
});

describe("a folder that somebody else put beside the points", () => {
  it("makes one backup full, be it old by its name, and is never built on", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await mkdir(path.join(node.storePath, "100/qemu-500"));
    await writeFile(path.join(node.storePath, "100/qemu-500/something"), "half a copy");
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe("full: directory qemu-500 is damaged: it has no manifest");
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe(`incremental since ${at(2000)}`);
    await expectRestores(node, second, third);
  });
});

describe("the witness outside the store", () => {
  it("that was lost or is older than the last backup makes the next one full", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const witness = path.join(node.root, "etc/pve/priv/pve-backup-host/bk/100.json");
    await mustBackUp(node, guest, { epoch: 1000 });
    const old = await readFile(witness);
    await mustBackUp(node, guest, { epoch: 2000 });
    await writeFile(witness, old);
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe("full: qemu-2000 was made through this storage since, and is not recorded here");
    await rm(witness);
    const fourth = await mustBackUp(node, guest, { epoch: 4000 });
    expect(modeOf(fourth.job)).toBe("full: there is no record here of a last backup through this storage");
    await expectRestores(node, third, fourth);
  });
});
