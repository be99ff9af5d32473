// SPDX-License-Identifier: AGPL-3.0-or-later
// Restores with and without the module: which way the disk is offered, and that it is the disk.
import assert from "node:assert/strict";
import { readdir, rm, stat } from "node:fs/promises";
import { NBD_MODULE_FOLDER } from "../protocol.ts";
import type { VmTest } from "./runner.ts";
import {
  connectForeign,
  expectDisk,
  fullImage,
  fullPoint,
  leftovers,
  NODES,
  newestPoint,
  nodeBytes,
  nodeOf,
  nothing,
  points,
  processesOf,
  Restore,
  refusalOf,
  run,
} from "./world.ts";

const [first, second] = fullPoint.disks;

export const beforeModule: VmTest[] = [
  {
    name: "without the module, nbd is refused with the line that loads it",
    run: async () => {
      await using restore = await Restore.begin(fullPoint, "nbd");
      const { message, hint } = await refusalOf(restore.offer(second.device));
      assert.match(message, /^Cannot use \/dev\/nbdX: the kernel module nbd is not loaded$/);
      assert.match(hint, /modprobe nbd nbds_max=[0-9]+/);
    },
  },
  {
    name: "without the module, auto offers a FUSE file and says nothing",
    run: async () => {
      await using restore = await Restore.begin(newestPoint, "auto");
      await expectDisk(await restore.offer(second.device), newestPoint.disks[1]);
      assert.deepEqual(restore.log, []);
      assert.equal((await processesOf("qemu-storage-daemon")).size, 1);
    },
  },
];

/** From here on there are nodes. */
async function loadModule(): Promise<void> {
  const [file] = (await readdir(NBD_MODULE_FOLDER)).filter((name) => name.startsWith("nbd.ko"));
  await run("busybox", ["insmod", `${NBD_MODULE_FOLDER}/${file}`, `nbds_max=${NODES}`, "max_part=0"]);
}

export const restores: VmTest[] = [
  {
    name: "auto offers every disk of every backup bit for bit as /dev/nbdX, two at once, and frees the nodes",
    run: async () => {
      await loadModule();
      for (const point of points) {
        await using restore = await Restore.begin(point, "auto");
        const nodes = new Set<number>();
        for (const disk of point.disks) {
          const file = await restore.offer(disk.device);
          assert.ok((await stat(file)).isBlockDevice(), `${file} is a block device`);
          assert.equal(await nodeBytes(nodeOf(file)), disk.sizeBytes);
          await expectDisk(file, disk);
          nodes.add(nodeOf(file));
        }
        assert.equal(nodes.size, 2);
        assert.deepEqual(restore.log, []);
      }
      assert.deepEqual(await leftovers(), nothing);
    },
  },
  {
    name: "PVE's qemu-img convert reads the node, and cleanup in between frees it",
    run: async () => {
      await using restore = await Restore.begin(newestPoint, "nbd");
      const node = await restore.offer(second.device);
      await run("qemu-img", ["convert", "-f", "raw", "-O", "raw", node, "/tmp/copy.raw"]);
      await expectDisk("/tmp/copy.raw", newestPoint.disks[1]);
      await rm("/tmp/copy.raw");
      await restore.withdraw(second.device);
      assert.deepEqual((await leftovers()).connected, []);
      assert.equal(await restore.offer(first.device), node); // free, so it is the first again
    },
  },
  {
    name: "fuse is obeyed although nodes are free",
    run: async () => {
      await using restore = await Restore.begin(newestPoint, "fuse");
      const file = await restore.offer(second.device);
      assert.ok((await stat(file)).isFile(), `${file} is a file`);
      await expectDisk(file, newestPoint.disks[1]);
    },
  },
  {
    name: "a node that another program has connected is passed over and stays connected",
    run: async () => {
      await using _foreign = await connectForeign(0, fullImage(first));
      {
        await using restore = await Restore.begin(newestPoint, "nbd");
        const file = await restore.offer(second.device);
        assert.equal(file, "/dev/nbd1");
        await expectDisk(file, newestPoint.disks[1]);
      }
      await expectDisk("/dev/nbd0", first);
    },
  },
];
