// SPDX-License-Identifier: AGPL-3.0-or-later
// A committed backup stays, whatever fails after it: QEMU has cleared its bitmap by then.
import { readdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { backUp, list } from "../support/vm/vm-job.ts";
import {
  copyDisks,
  DISK,
  expectRestores,
  MIB,
  modeOf,
  mustBackUp,
  never,
  openJob,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

const FIRST = "backup/100/qemu-1000";
const SECOND = "backup/100/qemu-2000";
const THIRD = "backup/100/qemu-3000";

describe("a job that fails after the commit", () => {
  it("keeps its point, warns, and the next incremental builds on it", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    const failed = await backUp(node, guest, { epoch: 2000, failAt: "after_backup_vm", oracleDir: `${node.dir}/o2` });
    expect(String(failed.error)).toContain("injected");
    expect(failed.log.filter((line) => line.startsWith("warn: "))).toEqual([
      expect.stringMatching(/^warn: backup "backup\/100\/qemu-2000" was complete before the job failed and is kept/),
    ]);
    expect(await list(node, VMID)).toEqual([FIRST, SECOND]);
    await guest.write(DISK, 16 * MIB, seededBytes("third", MIB));
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe(`incremental since ${SECOND}`);
    await expectRestores(node, first, { volname: SECOND, oracles: failed.oracles }, third);
  });

  it("keeps its point when the notes of the job are refused", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    await copyDisks(provider, guest, access);
    await access.finish(true);
    const failure = await provider.storage
      .updateVolumeAttribute(FIRST, "notes", "x".repeat(200_000), never)
      .catch(String);
    expect(failure).toContain("notes");
    expect(await provider.backup.backupCleanup(VMID, "qemu", false, String(failure), never)).toEqual({
      archiveSize: expect.any(Number),
    });
    expect(
      node.log.some((line) => line.startsWith("warn: ") && line.includes("is kept") && line.includes("notes")),
    ).toBe(true);
    expect(await list(node, VMID)).toEqual([FIRST]);
  });

  it("does not hold the guest's lock for notes, protection and retention", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    expect(await readdir(path.join(node.storePath, "100"))).toContain(".lock");
    await copyDisks(provider, guest, access);
    expect(await readdir(path.join(node.storePath, "100"))).not.toContain(".lock");
    await access.finish(true);
  });
});

describe("backupCleanup()", () => {
  it("comes with a failure before any backup_init and removes nothing", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await using provider = node.provider();
    expect(await provider.backup.backupCleanup(VMID, undefined, false, "no such VM", never)).toEqual({
      archiveSize: 0,
    });
    expect(await list(node, VMID)).toEqual([FIRST]);
  });

  it("comes again after a success, and twice after a failure, and removes nothing", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    await copyDisks(provider, guest, access);
    await access.finish(true);
    const { archiveSize } = await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never);
    expect(archiveSize).toBeGreaterThan(5 * MIB);
    expect(node.log.filter((line) => line.includes("is kept"))).toEqual([]);
    for (let time = 0; time < 2; time++)
      await provider.backup.backupCleanup(VMID, "qemu", false, "the hook died", never);
    expect(node.log.filter((line) => line.startsWith("warn: ") && line.includes("the hook died"))).toHaveLength(2);
    for (let time = 0; time < 2; time++) await provider.backup.jobCleanup(never);
    expect(await list(node, VMID)).toEqual([FIRST]);
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe(`incremental since ${FIRST}`);
  });

  it("frees the lock and removes the staging folder of a job that never copied", async () => {
    await using node = await TestNode.create();
    await using provider = node.provider();
    await provider.backup.backupInit(VMID, "qemu", 1000, never);
    await provider.backup.backupCleanup(VMID, undefined, false, "VM is locked", never);
    expect(await readdir(path.join(node.storePath, "100"))).toEqual([]);
  });
});

describe("backupHandleLogFile()", () => {
  it("keeps the log beside the point after a success, and in failed/ after a failure", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    expect(await readFile(path.join(node.storePath, "100/qemu-1000/backup.log"), "utf8")).toBe("INFO: task log\n");
    await backUp(node, guest, { epoch: 2000, failAt: "query" });
    expect(await readFile(path.join(node.storePath, "100/failed/qemu-2000.log"), "utf8")).toBe("INFO: task log\n");
    await backUp(node, guest, { epoch: 3000, failAt: "after_backup_vm" });
    expect(await readFile(path.join(node.storePath, "100/qemu-3000/backup.log"), "utf8")).toBe("INFO: task log\n");
    expect(await readdir(path.join(node.storePath, "100/failed"))).toEqual(["qemu-2000.log"]);
    expect(await list(node, VMID)).toEqual([FIRST, THIRD]);
  });

  it("never rejects: no job, a missing file, a folder, a store that is gone", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using provider = node.provider();
    const missing = path.join(node.dir, "no-such.log");
    await provider.backup.backupHandleLogFile(VMID, missing);
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    await access.finish(false);
    await provider.backup.backupCleanup(VMID, "qemu", false, "failed", never);
    for (const file of [missing, node.dir, `${node.dir}/a\0b`]) await provider.backup.backupHandleLogFile(VMID, file);
    expect(node.log.filter((line) => line.includes("the job's log could not be kept"))).toHaveLength(3);
    await writeFile(path.join(node.dir, "task.log"), "x\n");
    await using blind = node.provider({ path: path.join(node.dir, "gone") });
    await expect(blind.backup.backupInit(VMID, "qemu", 2000, never)).rejects.toThrow(/gone/);
    await blind.backup.backupCleanup(VMID, "qemu", false, "store is gone", never);
    await blind.backup.backupHandleLogFile(VMID, path.join(node.dir, "task.log"));
    expect(node.log.filter((line) => line.includes("the job's log could not be kept"))).toHaveLength(4);
  });
});
