// SPDX-License-Identifier: AGPL-3.0-or-later
// Bytes that rot in a backup never restore without a word: what is read is compared with the recorded checksums.
import { open, readFile, rm, utimes } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { compareRaw, runTool, seededBytes } from "../../fixtures/lab/index.ts";
import { backUpContainer, type ContainerFormat } from "../support/container/container-point.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { restore } from "../support/vm/vm-job.ts";
import { DISK, MIB, mustBackUp, never, refusalOf, startGuest } from "../support/vm/vm-rules.ts";

const NOT_COMPARED = /^warn: restoring ".*" without comparing it with its checksums \(dir-verify-restore 0\)$/;

/** Overwrites 8 bytes where `content` is in the file; its times stay what they were. */
async function rot(file: string, content: Buffer): Promise<void> {
  const at = (await readFile(file)).indexOf(content);
  expect(at).toBeGreaterThan(0);
  await using handle = await open(file, "r+");
  const { atime, mtime } = await handle.stat();
  await handle.write("rotten!!", at);
  await utimes(file, atime, mtime);
}

describe("a VM's backup of which 8 bytes rotted", () => {
  /** Two points; the base is rotten. */
  async function make(
    scfg: Record<string, unknown>,
  ): Promise<{ node: TestNode; oracle: string; child: string } & AsyncDisposable> {
    const node = await TestNode.create({ "dir-compression": "none", ...scfg });
    await using guest = await startGuest(node);
    await guest.write(DISK, 8 * MIB, seededBytes("rots", 64 * 1024));
    await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 2 * MIB, seededBytes("child", 4096));
    const { volname, oracles } = await mustBackUp(node, guest, { epoch: 2000 });
    const oracle = oracles.get(DISK) ?? "no oracle";
    return { node, oracle, child: volname, [Symbol.asyncDispose]: () => node[Symbol.asyncDispose]() };
  }
  const take = async (_device: string, rawPath: string): Promise<void> => void (await readFile(rawPath));
  const rotten = (node: TestNode): Promise<void> =>
    rot(path.join(node.storePath, `100/qemu-1000/${DISK}.qcow2`), seededBytes("rots", 64 * 1024).subarray(1000, 1032));

  it("does not restore, nor does the one that builds on it, and the sentence names the file", async () => {
    await using site = await make({});
    await rotten(site.node);
    for (const volname of [site.child, "backup/100/qemu-1000"]) {
      const { code, message } = await refusalOf(restore(site.node, volname, take));
      expect([volname, code]).toEqual([volname, "DAMAGED"]);
      expect(message).toMatch(
        /^Cannot verify the restored "drive-scsi0": checksum mismatch in ".*\/100\/qemu-1000\/drive-scsi0\.qcow2" \(xxh3-128\)$/,
      );
    }
  });

  it("gives back what is left of it with dir-verify-restore 0, and says so", async () => {
    await using site = await make({ "dir-verify-restore": 0 });
    await rotten(site.node);
    site.node.log.length = 0;
    await restore(site.node, site.child, async (_device, rawPath) => {
      expect(await compareRaw(rawPath, site.oracle)).toMatchObject({ identical: false });
    });
    expect(site.node.log).toContainEqual(expect.stringMatching(NOT_COMPARED));
  });

  it("is whole without a word where nothing rotted", async () => {
    await using site = await make({});
    site.node.log.length = 0;
    await restore(site.node, site.child, async (_device, rawPath) => {
      expect(await compareRaw(rawPath, site.oracle)).toMatchObject({ identical: true });
    });
    expect(site.node.log.filter((line) => line.startsWith("warn"))).toEqual([]);
  });

  it("makes nobody wait for the comparison when the restore is given up", async () => {
    await using site = await make({});
    await rotten(site.node);
    await using provider = site.node.provider();
    await provider.restore.restoreVmInit(site.child, never);
    await provider.restore.restoreVmVolumeInit(site.child, DISK, never);
    await provider.restore.restoreVmCleanup(site.child); // without the cleanup of the volume: no verdict is asked for
  });
});

describe.each<ContainerFormat>(["tar", "tar.zst", "sqfs"])(
  "a container's backup (%s) of which 8 bytes rotted",
  (format) => {
    it("does not restore", async (context) => {
      requireTool(context, "tar", "mksquashfs", "unsquashfs", "zstd");
      await using node = await TestNode.create();
      const volname = await backUpContainer(node, { epoch: 1000, format });
      const archive = path.join(node.storePath, volname.replace("backup/", ""), `archive.${format}`);
      const bytes = await readFile(archive);
      // In the middle, where content is; a tar and an image without compression hold it as it is.
      await rot(archive, bytes.subarray(Math.floor(bytes.length / 2), Math.floor(bytes.length / 2) + 40));
      await using provider = node.provider();
      const offer = await provider.restore.restoreContainerInit(volname, never);
      const target = path.join(node.dir, "restored");
      await runTool("mkdir", [target]);
      if ("tarPath" in offer) await runTool("tar", ["tf", offer.tarPath]).catch(() => "zstd may notice, too");
      const { code, message } = await refusalOf(provider.restore.restoreContainerCleanup(volname));
      expect(code).toBe("DAMAGED");
      expect(message).toMatch(
        /^Cannot verify the restored "backup\/101\/lxc-1000": checksum mismatch in ".*\/archive\.[a-z.]+" \(xxh3-128\)$/,
      );
      await rm(target, { recursive: true });
    });
  },
);
