// SPDX-License-Identifier: AGPL-3.0-or-later
// A store that is missing, no folder, read-only or full: one clear sentence, nothing left, nothing lost.
import { execFileSync } from "node:child_process";
import { mkdir, readdir, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it, type TestContext } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { BridgeProcess, buildBridge } from "../support/bridge/bridge-process.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { backUp, list } from "../support/vm/vm-job.ts";
import {
  DISK,
  expectRestores,
  leftovers,
  MIB,
  modeOf,
  mustBackUp,
  never,
  refusalOf,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

/** Mounts over the store until disposed; skips the test where mounting is not allowed. */
function mountStore(context: TestContext, node: TestNode, ...args: string[]): Disposable {
  requireTool(context, "mount", "umount");
  try {
    execFileSync("mount", [...args, node.storePath], { stdio: "pipe" });
  } catch (error) {
    if (process.env.REQUIRE_TOOLS === "1") throw error;
    context.skip("needs to mount, which is not allowed here");
  }
  return { [Symbol.dispose]: () => void execFileSync("umount", ["--lazy", node.storePath]) };
}

describe("a storage path that is no store", () => {
  it("fails every call with one sentence that names it, and is never created", async () => {
    await using node = await TestNode.create();
    const missing = path.join(node.dir, "not/mounted");
    const file = path.join(node.dir, "file");
    await writeFile(file, "");
    for (const [odd, text] of [
      [missing, `Cannot use storage path "${missing}": no such file or directory (ENOENT)`],
      [file, `Cannot use storage path "${file}": it is not a directory`],
    ] as const) {
      await using provider = node.provider({ path: odd });
      for (const call of [
        () => provider.backup.jobInit(),
        () => provider.backup.backupInit(VMID, "qemu", 1000, never),
        () => provider.storage.listVolumes(undefined, never),
        () => provider.restore.restoreVmInit("backup/100/qemu-1000", never),
      ]) {
        expect(await refusalOf(call())).toEqual({ code: "UNAVAILABLE", message: text });
      }
      await provider.backup.backupCleanup(VMID, undefined, false, "failed", never);
      await provider.backup.jobCleanup(never);
    }
    expect((await readdir(node.dir)).sort()).toEqual(["file", "root", "store"]);
  });

  it("that goes away in mid-copy fails the job; back again, the next backup is right", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 8 * MIB, seededBytes("second", 8 * MIB));
    {
      await using bundle = await buildBridge();
      await using bridge = await BridgeProcess.start(bundle, node);
      await using access = await bridge.openJob(guest, 2000, `${node.dir}/o2`);
      const copied = refusalOf(bridge.copyDisks(guest, access, 16 * MIB));
      await rename(node.storePath, `${node.storePath}.away`);
      expect((await copied).message).toMatch(/^Cannot [^\n]*$/);
      await bridge.call("backup_cleanup", { vmid: VMID, vmtype: "qemu", success: false, error: "failed" });
      await bridge.call("job_cleanup", {});
      await bridge.end("EOF");
    }
    await rename(`${node.storePath}.away`, node.storePath);
    expect(await list(node, VMID)).toEqual([first.volname]);
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    await expectRestores(node, first, third);
    expect(await leftovers(node)).toEqual([]);
  });
});

describe("a store that is read-only", () => {
  it("can be listed and restored from, and refuses a backup in one sentence", async (context) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    {
      using _mount = mountStore(context, node, "--bind", node.storePath);
      execFileSync("mount", ["-o", "remount,ro,bind", node.storePath]);
      const failed = await backUp(node, guest, { epoch: 2000 });
      expect((failed.error as Error).message).toMatch(/^Cannot [^\n]*: the file system is read-only \(EROFS\)$/);
      expect(await list(node, VMID)).toEqual([first.volname]);
      await expectRestores(node, first);
    }
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe(`incremental since ${first.volname}`);
  });
});

describe("a store that is full", () => {
  it.for(["none", "zstd"])("fails the job in one sentence and leaves nothing (%s)", async (compression, context) => {
    await using node = await TestNode.create({ "dir-compression": compression });
    await using guest = await startGuest(node);
    using _mount = mountStore(context, node, "-t", "tmpfs", "-o", "size=12m", "tmpfs");
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 8 * MIB, seededBytes("too much", 12 * MIB));
    const failed = await backUp(node, guest, { epoch: 2000 });
    expect(failed.error).toMatchObject({ code: "ENVIRONMENT" });
    expect((failed.error as Error).message).toMatch(
      /^Cannot write ".*drive-scsi0\.qcow2": no space left on the device \(ENOSPC\)$/,
    );
    expect(await list(node, VMID)).toEqual([first.volname]);
    expect(await leftovers(node)).toEqual([]);
    execFileSync("mount", ["-o", "remount,size=64m", node.storePath]);
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe(`incremental since ${first.volname}`);
    await expectRestores(node, first, third);
  });

  it("from the first byte on gives no lock and no backup", async (context) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    using _mount = mountStore(context, node, "-t", "tmpfs", "-o", "size=1m,nr_inodes=3", "tmpfs");
    await mkdir(path.join(node.storePath, "filler"));
    const failed = await backUp(node, guest, { epoch: 1000 });
    expect((failed.error as Error).message).toMatch(/^Cannot [^\n]*: no space left on the device \(ENOSPC\)$/);
    await rm(path.join(node.storePath, "filler"), { recursive: true });
    execFileSync("mount", ["-o", "remount,size=64m,nr_inodes=1000", node.storePath]);
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 2000 }));
  });
});
