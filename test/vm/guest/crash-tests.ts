// SPDX-License-Identifier: AGPL-3.0-or-later
// Processes that die with a node connected: the node must come free, and the next restore must be right.
import assert from "node:assert/strict";
import { once } from "node:events";
import { open, rm, truncate, writeFile } from "node:fs/promises";
import { until } from "../../../fixtures/lab/index.ts";
import type { VmTest } from "./runner.ts";
import {
  expectDisk,
  firstLine,
  isConnected,
  leftovers,
  newestPoint,
  nodeBytes,
  nodeOf,
  nothing,
  processesOf,
  Restore,
  run,
  serverOf,
  startRole,
} from "./world.ts";

const [first, second] = newestPoint.disks;

/** The role "hold": offers both disks as nodes, prints them, and stays. */
export async function holdNodes(): Promise<void> {
  const restore = await Restore.begin(newestPoint, "nbd");
  const files = [await restore.offer(first.device), await restore.offer(second.device)];
  process.stdout.write(`${JSON.stringify(files)}\n`);
  await once(process.stdin.resume(), "end");
}

async function expectNextRestore(): Promise<void> {
  {
    await using restore = await Restore.begin(newestPoint, "nbd");
    await expectDisk(await restore.offer(second.device), second);
    assert.deepEqual(restore.log, []);
  }
  assert.deepEqual(await leftovers(), nothing);
}

export const crashes: VmTest[] = [
  {
    name: "kill -9 of the restore: the next one finds all nodes free, though a qemu-nbd hung",
    run: async () => {
      const holder = startRole("hold");
      const nodes = (JSON.parse(await firstLine(holder)) as string[]).map(nodeOf);
      assert.deepEqual(nodes, [0, 1]);
      // One server hears of its owner's death and ends; the other is stopped and needs the sweep.
      process.kill(await serverOf(1), "SIGSTOP");
      holder.kill("SIGKILL");
      await once(holder, "exit");
      await until("/dev/nbd0 is free by itself", async () => !(await isConnected(0)));
      assert.equal(await isConnected(1), true);
      assert.equal((await processesOf("qemu-nbd")).size, 1);
      await expectNextRestore();
    },
  },
  {
    name: "kill -9 of qemu-nbd before the first read: qemu-img copies nothing and is content, so the cleanup refuses",
    run: async () => {
      {
        await using restore = await Restore.begin(newestPoint, "nbd");
        const file = await restore.offer(second.device);
        process.kill(await serverOf(nodeOf(file)), "SIGKILL");
        await until(`${file} is empty`, async () => (await nodeBytes(nodeOf(file))) === 0);
        await writeFile("/tmp/target.raw", "");
        await truncate("/tmp/target.raw", second.sizeBytes);
        await run("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", file, "/tmp/target.raw"]);
        await rm("/tmp/target.raw");
        await assert.rejects(restore.withdraw(second.device), killed("drive-scsi1"));
      }
      await expectNextRestore();
    },
  },
  {
    name: "kill -9 of qemu-nbd in mid-read: the reader ends with EIO, the node comes free, the next restore is right",
    run: async () => {
      {
        await using restore = await Restore.begin(newestPoint, "nbd");
        const file = await restore.offer(first.device);
        const server = await serverOf(nodeOf(file));
        await assert.rejects(
          readForever(file, () => process.kill(server, "SIGKILL")),
          { code: "EIO" },
        );
        await assert.rejects(restore.withdraw(first.device), killed("drive-scsi0"));
      }
      assert.deepEqual(await leftovers(), nothing);
      await expectNextRestore();
    },
  },
];

/** The whole sentence: not a word of what qemu-nbd said when it connected the node. */
function killed(device: string): { message: string } {
  const trouble = "it was not served to the end, qemu-nbd was ended by SIGKILL";
  return { message: `Cannot verify the restored "${device}": ${trouble}` };
}

/**
 * Reads the node over and over, never from memory; calls `then` once it is under way. Ends by an error alone.
 *
 * The kernel promises that a read is never answered with an end of the file or with bytes that it did not get. It may
 * first hand over what of a read had arrived before the server died: a reader goes on there, as qemu-img does.
 */
async function readForever(file: string, then: () => void): Promise<never> {
  const pieceBytes = 65_536;
  await using handle = await open(file);
  for (let pass = 0; ; pass++) {
    await writeFile("/proc/sys/vm/drop_caches", "3");
    for (let offset = 0; offset < first.sizeBytes; offset += pieceBytes) {
      for (let done = 0; done < pieceBytes; ) {
        const { bytesRead } = await handle.read(Buffer.alloc(pieceBytes), 0, pieceBytes - done, offset + done);
        assert.notEqual(bytesRead, 0, "an end of the file in the middle of the disk");
        done += bytesRead;
      }
      if (pass === 0 && offset === 2 ** 20) then();
    }
  }
}

export const atTheEnd: VmTest[] = [
  {
    name: "in the end the module can be unloaded, and the kernel has complained of nothing",
    run: async () => {
      await rm("/tmp/held", { recursive: true, force: true });
      assert.deepEqual(await leftovers(), nothing);
      await run("busybox", ["rmmod", "nbd"]);
      const { stdout } = await run("busybox", ["dmesg"]);
      assert.deepEqual(
        stdout.split("\n").filter((line) => /BUG|WARNING:|Oops|blocked for more than/.test(line)),
        [],
      );
    },
  },
];
