// SPDX-License-Identifier: AGPL-3.0-or-later
// Which disk is backed up in full, and what happens if the answer is no longer true when the copy begins.
import { cp, readFile, rename, rm, truncate, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { Store } from "../../src/store/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { backUp, list } from "../support/vm/vm-job.ts";
import {
  copyDisks,
  DISK,
  DISK_BYTES,
  expectRestores,
  MIB,
  modeOf,
  mustBackUp,
  never,
  openJob,
  refusalOf,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

const FIRST = "backup/100/qemu-1000";
const SECOND_DISK = "drive-virtio1";

describe("backupVmQueryIncremental()", () => {
  it("answers nothing in mode full, and the backup is full", async () => {
    await using node = await TestNode.create({ "vm-backup-mode": "full" });
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(second.job.modes).toEqual(new Map());
    expect(modeOf(second.job)).toBe("full: vm-backup-mode is full");
    expect(await guest.bitmap(DISK)).toBeUndefined();
    await expectRestores(node, first, second);
  });

  it("answers use for a disk with a base and new for one without, in one job", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await guest.addDisk({ device: SECOND_DISK, sizeBytes: 9 * MIB + 512 });
    await guest.write(SECOND_DISK, 0, seededBytes("new disk", MIB));
    const { job, ...second } = await mustBackUp(node, guest, { epoch: 2000 });
    expect([...job.modes].sort()).toEqual([
      [DISK, "use"],
      [SECOND_DISK, "new"],
    ]);
    expect(modeOf(job)).toBe(`incremental since ${FIRST}`);
    expect(modeOf(job, SECOND_DISK)).toBe("full: it is not part of the last backup");
    await expectRestores(node, second);
  });

  it("is bound by the last answer where it is asked twice", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await using provider = node.provider();
    const { backup } = provider;
    await backup.jobInit();
    await backup.backupInit(VMID, "qemu", 2000, never);
    const ask = () => backup.backupVmQueryIncremental(VMID, guest.devices, never);
    const first = await ask();
    expect(first).toEqual(new Map([[DISK, "use"]]));
    await rm(path.join(node.storePath, "100/qemu-1000"), { recursive: true });
    expect(await ask()).toEqual(new Map([[DISK, "new"]]));
    await using access = await guest.openBackup({ modes: first });
    const { message } = await refusalOf(copyDisks(provider, guest, access));
    expect(message).toBe(`Cannot back up "${DISK}": PVE reuses a bitmap that this storage did not ask for`);
  });

  it("answers new for a disk of another size", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await guest.resizeDisk(DISK, DISK_BYTES + MIB);
    const { job, ...second } = await mustBackUp(node, guest, { epoch: 2000 });
    expect(job.modes).toEqual(new Map([[DISK, "new"]]));
    expect(modeOf(job)).toBe("full: size changed from 24.0 MiB to 25.0 MiB");
    await expectRestores(node, second);
  });
});

describe("a disk that was promised as incremental", () => {
  it("is read in full when QEMU lost its bitmap and started a new one", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 7 * MIB, seededBytes("lost", MIB));
    const { job, ...second } = await mustBackUp(node, guest, { epoch: 2000, afterQuery: () => guest.dropBitmap(DISK) });
    expect(job.modes).toEqual(new Map([[DISK, "use"]]));
    expect(modeOf(job)).toBe("full: QEMU has no bitmap of it, or started a new one");
    await expectRestores(node, second);
  });

  it("is read in full when PVE uses no bitmap after all", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await using provider = node.provider();
    await provider.backup.backupInit(VMID, "qemu", 2000, never);
    await guest.write(DISK, 7 * MIB, seededBytes("unseen", MIB));
    expect(await provider.backup.backupVmQueryIncremental(VMID, guest.devices, never)).toEqual(
      new Map([[DISK, "use"]]),
    );
    await using access = await guest.openBackup({ oracleDir: `${node.dir}/oracle` }); // effective mode: none
    await copyDisks(provider, guest, access);
    await access.finish(true);
    expect((await provider.storage.listVolumes(VMID, never)).map(({ parent }) => parent)).toEqual([
      undefined,
      "backup/100/qemu-1000",
    ]);
    await expectRestores(node, { volname: "backup/100/qemu-2000", oracles: access.oracles });
  });
});

describe("a reused bitmap that was never asked for", () => {
  it("is refused, and nothing is listed", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await using provider = node.provider({ "vm-backup-mode": "full" });
    await provider.backup.backupInit(VMID, "qemu", 2000, never);
    await provider.backup.backupVmQueryIncremental(VMID, guest.devices, never);
    await using access = await guest.openBackup({ modes: { [DISK]: "use" } });
    expect(access.volumes[DISK]).toMatchObject({ "bitmap-mode": "reuse" });
    expect(await refusalOf(copyDisks(provider, guest, access))).toMatchObject({
      code: "INVALID_PARAMS",
      message: `Cannot back up "${DISK}": PVE reuses a bitmap that this storage did not ask for`,
    });
    await provider.backup.backupCleanup(VMID, "qemu", false, "failed", never);
    expect(await list(node, VMID)).toEqual([FIRST]);
  });
});

describe("the base of a job", () => {
  it("cannot be removed from the question to the commit, and can be afterwards", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    const { root, storePath, storeid } = node;
    const store = await Store.open({ path: storePath, root, storeid, nodename: "remover" });
    const base = await store.openPoint(FIRST, never);
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 2000 });
    const refusal = await refusalOf(store.lockPointExclusive(base, never));
    expect(refusal).toMatchObject({ code: "LOCKED", message: expect.stringContaining(`process ${process.pid} on`) });
    await copyDisks(provider, guest, access);
    await access.finish(true);
    await using _free = await store.lockPointExclusive(base, never);
  });
});

describe("a base that goes between the question and the copy", () => {
  const losses: ReadonlyArray<readonly [string, (folder: string) => Promise<void>]> = [
    ["is deleted", (folder) => rm(folder, { recursive: true })],
    ["is moved away", (folder) => rename(folder, `${folder}.bak`)],
    ["loses its manifest", (folder) => rm(path.join(folder, "manifest.json"))],
    ["loses bytes of its image", (folder) => truncate(path.join(folder, `${DISK}.qcow2`), 3 * 65536)],
    ["is replaced by another backup of its name", replaceByAnother],
  ];

  it.each(losses)("fails the job if it %s; nothing is lost, and the next backup is full and right", async (_, lose) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 12 * MIB, seededBytes("since", MIB));
    const dirty = (await guest.bitmap(DISK))?.dirtyBytes ?? 0;
    const before = await list(node, VMID);
    const failed = await backUp(node, guest, {
      epoch: 2000,
      afterQuery: () => lose(path.join(node.storePath, "100/qemu-1000")),
      during: () => guest.write(DISK, 20 * MIB, seededBytes("during", MIB)),
    });
    expect(failed.modes).toEqual(new Map([[DISK, "use"]]));
    expect(failed.error).toMatchObject({ code: "BASE_UNUSABLE" });
    expect(String(failed.error)).toMatch(/Cannot build on "backup\/100\/qemu-\d+": it is no longer usable as a base: /);
    expect(before).toContain(FIRST);
    expect(await list(node, VMID)).not.toContain("backup/100/qemu-2000");
    expect(await mergedBack(guest)).toBeGreaterThan(dirty);
    const { job, ...third } = await mustBackUp(node, guest, { epoch: 3000 });
    expect(job.modes).toEqual(new Map([[DISK, "new"]]));
    await expectRestores(node, third);
    const fourth = await mustBackUp(node, guest, { epoch: 4000 });
    expect(modeOf(fourth.job)).toBe("incremental since backup/100/qemu-3000");
  });
});

async function mergedBack(guest: LabGuest): Promise<number> {
  return (await guest.bitmap(DISK))?.dirtyBytes ?? 0;
}

/** The same name, the same files, another UUID: as after a restore of the store from elsewhere. */
async function replaceByAnother(folder: string): Promise<void> {
  await cp(folder, `${folder}.copy`, { recursive: true });
  await rm(folder, { recursive: true });
  await rename(`${folder}.copy`, folder);
  const manifest = path.join(folder, "manifest.json");
  const text = await readFile(manifest, "utf8");
  const other = text.replace(/("uuid": ?")[0-9a-f]{8}/, "$100000000");
  if (other === text) throw new Error("The manifest names no UUID");
  await writeFile(manifest, other);
}
