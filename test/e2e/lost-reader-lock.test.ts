// SPDX-License-Identifier: AGPL-3.0-or-later
// A restore whose lock somebody took away: the backup may have been removed or changed under it, so what was read is
// no longer verified.
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { beforeEach, describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import type { LockTiming } from "../../src/store/index.ts";
import { backUpContainer, CT_VMID } from "../support/container/container-point.ts";
import { ANOTHER_HOST, encodeLock, type LockJson } from "../support/fault/lock-files.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { DISK, DISK_BYTES, MIB, mustBackUp, never, startGuest, VMID } from "../support/vm/vm-rules.ts";

const TIMING: LockTiming = { heartbeatMs: 50, staleMs: 3_000, observeMs: 1_000 };
const SECOND_DISK = "drive-virtio1";
const TOP = "backup/100/qemu-2000";

const SENTENCE = /^Cannot [^\n]*(lock|taken over)[^\n]*$/;

/** Two disks, two points: four images, one lock. */
async function twoPoints(node: TestNode): Promise<void> {
  const disks = [DISK, SECOND_DISK].map((device) => ({ device, sizeBytes: DISK_BYTES }));
  await using guest = await startGuest(node, { disks });
  await mustBackUp(node, guest, { epoch: 1000 });
  await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
  await mustBackUp(node, guest, { epoch: 2000 });
}

async function sharedLocks(node: TestNode, vmid: number): Promise<string[]> {
  const folder = path.join(node.storePath, String(vmid), ".locks");
  const names = await readdir(folder);
  return names.filter((name) => name.includes(".shared-")).map((name) => path.join(folder, name));
}

const losses: ReadonlyArray<readonly [string, (locks: readonly string[]) => Promise<void>]> = [
  ["was removed", (locks) => removeAll(locks)],
  ["is another's now", giveAway],
];

async function removeAll(locks: readonly string[]): Promise<void> {
  expect(locks.length).toBeGreaterThan(0);
  for (const lock of locks) await rm(lock);
}

async function giveAway(locks: readonly string[]): Promise<void> {
  expect(locks.length).toBeGreaterThan(0);
  for (const lock of locks) {
    const record = JSON.parse(await readFile(lock, "utf8")) as LockJson;
    const uuid = "11111111-2222-4333-8444-555555555555";
    await writeFile(lock, encodeLock({ ...record, uuid, hostId: ANOTHER_HOST, hostname: "pve2" }));
  }
}

/** Messages of those that fail, in order; none stops the next, PVE cleans up after failures, too. */
async function failuresOf(...calls: ReadonlyArray<() => Promise<unknown>>): Promise<string[]> {
  const messages: string[] = [];
  for (const call of calls) {
    await call().catch((error: Error) => messages.push(error.message));
  }
  return messages;
}

describe("a VM's restore whose lock", () => {
  it.each(losses)("%s while it reads a disk fails", async (_what, lose) => {
    await using node = await TestNode.create();
    await twoPoints(node);
    await using provider = node.provider({}, { lockTiming: TIMING });
    await provider.restore.restoreVmInit(TOP, never);
    const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(TOP, DISK, never);
    await readFile(qemuImgPath);
    await lose(await sharedLocks(node, VMID));
    const failures = await failuresOf(
      () => provider.restore.restoreVmVolumeCleanup(TOP, DISK),
      () => provider.restore.restoreVmCleanup(TOP),
    );
    expect(failures[0]).toMatch(SENTENCE);
    expect(await readdir(path.join(node.root, "run/pve-backup-host")).catch(() => [])).toEqual([]);
  });

  it.each(losses)("%s between two disks does not offer the second, or fails at its end", async (_what, lose) => {
    await using node = await TestNode.create();
    await twoPoints(node);
    await using provider = node.provider({}, { lockTiming: TIMING });
    await provider.restore.restoreVmInit(TOP, never);
    await provider.restore.restoreVmVolumeInit(TOP, DISK, never);
    await provider.restore.restoreVmVolumeCleanup(TOP, DISK);
    await lose(await sharedLocks(node, VMID));
    await sleep(4 * TIMING.heartbeatMs); // it may find out by itself
    const failures = await failuresOf(
      () => provider.restore.restoreVmVolumeInit(TOP, SECOND_DISK, never),
      () => provider.restore.restoreVmVolumeCleanup(TOP, SECOND_DISK),
      () => provider.restore.restoreVmCleanup(TOP),
    );
    expect(failures[0]).toMatch(SENTENCE);
    expect(await readdir(path.join(node.root, "run/pve-backup-host")).catch(() => [])).toEqual([]);
  });

  it("stays where it is passes; it names all points that are read", async () => {
    await using node = await TestNode.create();
    await twoPoints(node);
    await using provider = node.provider({}, { lockTiming: TIMING });
    await provider.restore.restoreVmInit(TOP, never);
    await provider.restore.restoreVmVolumeInit(TOP, DISK, never);
    const [lock, ...others] = await sharedLocks(node, VMID);
    expect(others).toEqual([]);
    expect(JSON.parse(await readFile(lock ?? "", "utf8"))).toMatchObject({ points: ["qemu-1000", "qemu-2000"] });
    await sleep(10 * TIMING.heartbeatMs);
    await provider.restore.restoreVmVolumeCleanup(TOP, DISK);
    await provider.restore.restoreVmCleanup(TOP);
    expect(await sharedLocks(node, VMID)).toEqual([]);
  });
});

describe.each(["tar", "sqfs"] as const)("a container's restore (%s) whose lock", (format) => {
  beforeEach((context) => requireTool(context, "tar", "mksquashfs", "unsquashfs"));

  it.each([
    ["was removed", removeAll],
    ["is another's now", giveAway],
  ])("%s fails at its cleanup", async (_what, lose) => {
    await using node = await TestNode.create();
    const volname = await backUpContainer(node, { epoch: 1000, format });
    await using provider = node.provider({}, { lockTiming: TIMING });
    await provider.restore.restoreContainerInit(volname, never);
    await lose(await sharedLocks(node, CT_VMID));
    const failures = await failuresOf(() => provider.restore.restoreContainerCleanup(volname));
    expect(failures).toEqual([expect.stringMatching(SENTENCE)]);
    expect(await readdir(path.join(node.root, "run/pve-backup-host")).catch(() => [])).toEqual([]);
  });
});
