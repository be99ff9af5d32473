// SPDX-License-Identifier: AGPL-3.0-or-later
// QEMU goes, hangs or runs out of fleecing space: one clear sentence, nothing listed, the next backup right.
import path from "node:path";
import { describe, expect, it } from "vitest";
import { type LabBackup, type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import type { DirectoryProvider } from "../../src/directory/directory-provider.ts";
import type { VmVolume } from "../../src/provider/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { list } from "../support/vm/vm-job.ts";
import {
  copyDisks,
  DISK,
  DISK_BYTES,
  expectRestores,
  leftovers,
  MIB,
  modeOf,
  mustBackUp,
  never,
  openJob,
  QEMU_ENDED,
  refusalOf,
  startGuest,
  untilCopying,
  VMID,
} from "../support/vm/vm-rules.ts";

/** Slow enough to be in mid-copy when something happens: the disk has 5 MiB of data and more. */
const SLOW = 3 * MIB;

/** What a failed job must leave: nothing listed, no staging folder, no lock. */
async function expectNothingLeft(node: TestNode, provider: DirectoryProvider, listed: string[]): Promise<void> {
  await provider.backup.backupCleanup(VMID, "qemu", false, "failed", never);
  expect(await list(node, VMID)).toEqual(listed);
  expect(await leftovers(node)).toEqual([]);
}

/** A job whose volumes are changed before backup_vm. */
async function refusedCopy(
  provider: DirectoryProvider,
  guest: LabGuest,
  access: LabBackup,
  change: Partial<VmVolume>,
): Promise<Awaited<ReturnType<typeof refusalOf>>> {
  const volumes = new Map([...access.vmVolumes()].map(([device, volume]) => [device, { ...volume, ...change }]));
  const info = { bandwidthLimit: 0, firewallConfig: undefined };
  return await refusalOf(provider.backup.backupVm(VMID, Buffer.from(guest.guestConfig), volumes, info, never));
}

describe("an NBD server that is not what PVE said", () => {
  it("is refused: no socket, another size, a bitmap that is not offered", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    for (const [epoch, change, text] of [
      [
        2000,
        { nbdPath: path.join(node.dir, "no-such.sock") },
        /^Cannot back up "drive-scsi0": the QEMU process of VM 100 ended its NBD server during the backup \(ENOENT\)$/,
      ],
      [3000, { nbdPath: undefined }, /PVE named no NBD socket/],
      [4000, { bitmapName: "snapshot-access:other" }, /QEMU does not offer the bitmap "snapshot-access:other"/],
    ] as const) {
      await using provider = node.provider();
      await using access = (await openJob(provider, guest, { epoch })).access;
      expect((await refusedCopy(provider, guest, access, change)).message).toMatch(text);
      await expectNothingLeft(node, provider, ["backup/100/qemu-1000"]);
    }
    await using provider = node.provider();
    await provider.backup.backupInit(VMID, "qemu", 5000, never);
    await using access = await guest.openBackup();
    const refusal = await refusedCopy(provider, guest, access, { size: DISK_BYTES - 512 });
    expect(refusal.message).toBe(
      `Cannot back up "${DISK}": its NBD export has ${DISK_BYTES} bytes, PVE said ${DISK_BYTES - 512}`,
    );
    await expectNothingLeft(node, provider, ["backup/100/qemu-1000"]);
    await access.finish(false);
    const last = await mustBackUp(node, guest, { epoch: 6000 });
    await expectRestores(node, last);
  });
});

describe("QEMU that dies in mid-copy", () => {
  it("fails the job with one sentence and leaves nothing; the next backup is right", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    const copy = refusalOf(copyDisks(provider, guest, access, SLOW));
    await untilCopying(node);
    await guest.kill();
    const { code, message } = await copy;
    expect(code).toBe("SOURCE");
    expect(message).toMatch(QEMU_ENDED);
    await access.finish(false);
    await expectNothingLeft(node, provider, []);
    await guest.restart();
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 2000 }));
  });
});

describe("QEMU that hangs", () => {
  it("in mid-copy fails the job within the time allowed; the next backup is right", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using provider = node.provider({}, { timeouts: { connectTimeoutMs: 5_000, replyTimeoutMs: 2_000 } });
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    const copy = refusalOf(copyDisks(provider, guest, access, SLOW));
    await untilCopying(node);
    guest.freeze();
    const startMs = performance.now();
    try {
      const { code, message } = await copy;
      expect(code).toBe("SOURCE");
      expect(message).toMatch(
        /^Cannot back up "drive-scsi0": the QEMU process of VM 100 hangs, NBD server at ".*" did not answer for 2 s \(/,
      );
      expect(performance.now() - startMs).toBeLessThan(20_000);
    } finally {
      guest.thaw();
    }
    await access.finish(false);
    await expectNothingLeft(node, provider, []);
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 2000 }));
  });

  it("can be given up at once: a cancelled job does not wait for it", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    const cancel = new AbortController();
    const copy = refusalOf(copyDisks(provider, guest, access, SLOW, cancel.signal));
    await untilCopying(node);
    guest.freeze();
    try {
      const startMs = performance.now();
      cancel.abort(new Error("stopped by the user"));
      expect((await copy).message).toBe("stopped by the user");
      expect(performance.now() - startMs).toBeLessThan(4_000); // the server would have 5 s to answer
    } finally {
      guest.thaw();
    }
    await access.finish(false);
    await expectNothingLeft(node, provider, []);
  });
});

describe("a fleecing image that is full", () => {
  it("fails the job and leaves nothing; the next backup holds it all", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 0, seededBytes("second", 16 * MIB));
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 2000, fleecingBytes: 2 * MIB });
    const copy = refusalOf(copyDisks(provider, guest, access, SLOW));
    await untilCopying(node);
    await guest.write(DISK, 0, seededBytes("third", 16 * MIB)).catch(() => undefined);
    expect(await copy).toEqual({
      code: "SOURCE",
      message:
        `Cannot read "${DISK}": QEMU gave up the snapshot of the disk during the backup (EINVAL), ` +
        "as it does when the fleecing storage is full or too slow",
    });
    await access.finish(false);
    await expectNothingLeft(node, provider, [first.volname]);
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe(`incremental since ${first.volname}`);
    await expectRestores(node, first, third);
  });
});
