// SPDX-License-Identifier: AGPL-3.0-or-later
// dir-device-view on a machine without the kernel module nbd; with it: test/vm.
import { readdir, stat } from "node:fs/promises";
import path from "node:path";
import { beforeEach, describe, expect, it } from "vitest";
import { HostError } from "../../src/core/index.ts";
import { nbdHost } from "../../src/device/index.ts";
import { hasNbdModule } from "../../src/device/nbd-host.ts";
import { TestNode } from "../support/node/test-node.ts";
import {
  DISK,
  DISK_BYTES,
  expectRestores,
  mustBackUp,
  never,
  type SafeBackup,
  startGuest,
} from "../support/vm/vm-rules.ts";

beforeEach(async (context) => {
  if (await hasNbdModule(nbdHost())) context.skip("needs a machine where the kernel module nbd is not loaded");
});

async function backedUp(node: TestNode): Promise<SafeBackup> {
  await using guest = await startGuest(node);
  return await mustBackUp(node, guest, { epoch: 1000 });
}

describe("dir-device-view", () => {
  it.each([["auto"], ["fuse"], [undefined]])("%s restores from a file, and says nothing of nodes", async (view) => {
    await using node = await TestNode.create({ "dir-device-view": view });
    const backup = await backedUp(node);
    const logStart = node.log.length;
    await expectRestores(node, backup);
    expect(node.log.slice(logStart)).toEqual([]);
    await using provider = node.provider();
    await provider.restore.restoreVmInit(backup.volname, never);
    const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(backup.volname, DISK, never);
    const status = await stat(qemuImgPath);
    expect([status.isFile(), status.size]).toEqual([true, DISK_BYTES]);
  });

  it("nbd ends the restore with the modprobe line, and leaves nothing behind", async () => {
    await using node = await TestNode.create({ "dir-device-view": "nbd" });
    const { volname } = await backedUp(node);
    await using provider = node.provider();
    await provider.restore.restoreVmInit(volname, never);
    const attempt = provider.restore.restoreVmVolumeInit(volname, DISK, never);
    await expect(attempt).rejects.toBeInstanceOf(HostError);
    await expect(attempt).rejects.toThrow(/^Cannot use \/dev\/nbdX: the kernel module nbd is not loaded$/);
    await expect(attempt).rejects.toMatchObject({
      hint: expect.stringContaining("modprobe nbd nbds_max=16 max_part=0"),
    });
    await provider.restore.restoreVmVolumeCleanup(volname, DISK); // as PVE does after a failure
    await provider.restore.restoreVmCleanup(volname);
    expect(await readdir(path.join(node.root, "run/pve-backup-host")).catch(() => [])).toEqual([]);
    expect(await readdir(path.join(node.root, "run/qemu-server"))).not.toContain("reserved-dev-nbd-nodes");
  });
});
