// SPDX-License-Identifier: AGPL-3.0-or-later
// One job, one provider, several guests: what happens to one of them must not reach the next.
import { readdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { list, restore } from "../support/vm/vm-job.ts";
import {
  copyDisks,
  DISK,
  expectRestores,
  MIB,
  never,
  openJob,
  refusalOf,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

const OTHER = 101;

describe("a job of two guests", () => {
  it.each(["none", "zlib", "zstd"])(
    "backs up the second after the first was cancelled in mid-copy (%s)",
    async (kind) => {
      await using node = await TestNode.create({ "dir-compression": kind });
      await using guest = await startGuest(node);
      const dir = path.join(node.dir, "vm2");
      const disks = [{ device: DISK, sizeBytes: 16 * MIB }];
      await using other = await LabGuest.start({ dir, root: node.root, vmid: OTHER, storeid: node.storeid, disks });
      await guest.write(DISK, 8 * MIB, Buffer.alloc(8 * MIB, "compressible "));
      await other.write(DISK, 0, seededBytes("other", 4 * MIB));
      await using provider = node.provider();
      const first = await openJob(provider, guest, { epoch: 1000 });
      const cancel = new AbortController();
      const copy = refusalOf(copyDisks(provider, guest, first.access, 4 * MIB, cancel.signal));
      await sleep(150);
      cancel.abort(new Error("the first one is cancelled"));
      expect((await copy).message).toBe("the first one is cancelled");
      await first.access.finish(false);
      await provider.backup.backupCleanup(VMID, "qemu", false, "cancelled", never);
      const taskLog = path.join(node.dir, "task.log");
      await writeFile(taskLog, "log of 100\n");
      await provider.backup.backupHandleLogFile(VMID, taskLog);

      const { archiveName } = await provider.backup.backupInit(OTHER, "qemu", 1000, never);
      const modes = await provider.backup.backupVmQueryIncremental(OTHER, other.devices, never);
      await using access = await other.openBackup({ modes, oracleDir: `${node.dir}/oracle` });
      await copyDisks(provider, other, access);
      await access.finish(true);
      await provider.backup.backupCleanup(OTHER, "qemu", true, undefined, never);
      await provider.backup.backupHandleLogFile(OTHER, taskLog);
      await provider.backup.jobCleanup(never);
      expect(await list(node, VMID)).toEqual([]);
      expect(await readdir(path.join(node.storePath, "100/failed"))).toEqual(["qemu-1000.log"]);
      expect(await readdir(path.join(node.storePath, "101/qemu-1000"))).toContain("backup.log");
      await expectRestores(node, { volname: `backup/${archiveName}`, oracles: access.oracles });
      expect(node.log.filter((line) => line.includes("have no effect here"))).toHaveLength(1);
    },
  );

  it("goes on after a guest whose cleanup never came", async () => {
    await using node = await TestNode.create();
    await using provider = node.provider();
    await provider.backup.backupInit(VMID, "qemu", 1000, never);
    await provider.backup.backupInit(OTHER, "qemu", 1000, never);
    expect(await readdir(path.join(node.storePath, "100"))).toEqual([]);
    const refusal = await refusalOf(provider.backup.backupVmQueryIncremental(VMID, new Map(), never));
    expect(refusal.message).toBe("Cannot back up VM 100: backup_init was not called for it");
  });
});

describe("a guest without disks", () => {
  it("has a backup of its config, which restores", async () => {
    await using node = await TestNode.create();
    await using provider = node.provider();
    await provider.backup.backupInit(VMID, "qemu", 1000, never);
    expect(await provider.backup.backupVmQueryIncremental(VMID, new Map(), never)).toEqual(new Map());
    const config = Buffer.from("name: diskless\n");
    await provider.backup.backupVm(VMID, config, new Map(), { bandwidthLimit: 0, firewallConfig: undefined }, never);
    expect((await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never)).archiveSize).toBeGreaterThan(0);
    const restored = await restore(node, "backup/100/qemu-1000", async () => undefined);
    expect(restored).toMatchObject({ guestConfig: config, devices: [] });
  });
});
