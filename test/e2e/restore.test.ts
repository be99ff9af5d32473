// SPDX-License-Identifier: AGPL-3.0-or-later
// What a restore gets: exact sizes, exact bytes, or a reason before anything is on offer.
import { randomBytes } from "node:crypto";
import { copyFile, open, readdir, readFile, rename, rm, stat, symlink, truncate, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { runTool, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { restore } from "../support/vm/vm-job.ts";
import {
  copyDisks,
  DISK,
  DISK_BYTES,
  expectRestores,
  MIB,
  mustBackUp,
  never,
  openJob,
  refusalOf,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

const FIRST = "backup/100/qemu-1000";
const SECOND = "backup/100/qemu-2000";

/** A chain of two points. */
async function twoPoints(node: TestNode): Promise<void> {
  await using guest = await startGuest(node);
  await mustBackUp(node, guest, { epoch: 1000 });
  await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
  await mustBackUp(node, guest, { epoch: 2000 });
}

const imageOf = (node: TestNode, epoch: number): string => path.join(node.storePath, `100/qemu-${epoch}/${DISK}.qcow2`);

describe("restoreVmInit()", () => {
  it("gives the exact size of every disk, and the offered files have it", async () => {
    await using node = await TestNode.create();
    const disks = [
      { device: DISK, sizeBytes: DISK_BYTES },
      { device: "drive-virtio15", sizeBytes: 3 * MIB + 512 },
      { device: "drive-efidisk0", sizeBytes: 540_672 },
      { device: "drive-tpmstate0-backup", sizeBytes: 512 },
    ];
    await using guest = await startGuest(node, { disks });
    await mustBackUp(node, guest, { epoch: 1000 });
    await using provider = node.provider();
    const sizes = await provider.restore.restoreVmInit(FIRST, never);
    expect(sizes).toEqual(new Map(disks.map(({ device, sizeBytes }) => [device, { size: sizeBytes }])));
    for (const { device, sizeBytes } of disks) {
      const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(FIRST, device, never);
      expect((await stat(qemuImgPath)).size).toBe(sizeBytes);
      await provider.restore.restoreVmVolumeCleanup(FIRST, device);
    }
    await provider.restore.restoreVmCleanup(FIRST);
  });

  it("refuses an unknown disk, a disk before the init, and a backup that is not there", async () => {
    await using node = await TestNode.create();
    await twoPoints(node);
    await using provider = node.provider();
    expect((await refusalOf(provider.restore.restoreVmVolumeInit(FIRST, DISK, never))).message).toBe(
      `Cannot restore "${DISK}": the restore of "${FIRST}" was not begun`,
    );
    await provider.restore.restoreVmInit(FIRST, never);
    for (const device of ["drive-scsi1", "../qemu-2000/drive-scsi0", ""]) {
      const { code, message } = await refusalOf(provider.restore.restoreVmVolumeInit(FIRST, device, never));
      expect(code).toBe("INVALID_PARAMS");
      expect(message).toBe(`Cannot restore "${device}" of "${FIRST}": this backup has no such disk`);
    }
    expect((await refusalOf(provider.restore.restoreVmInit("backup/100/qemu-7", never))).code).toBe("NOT_FOUND");
    for (const odd of ["backup/100/../100/qemu-1000", "backup/100/.lock", "/etc/passwd", ""]) {
      expect((await refusalOf(provider.restore.restoreVmInit(odd, never))).code).toBe("INVALID_PARAMS");
    }
  });

  it("may be cleaned up twice, and without having begun", async () => {
    await using node = await TestNode.create();
    await twoPoints(node);
    await using provider = node.provider();
    await provider.restore.restoreVmCleanup(FIRST);
    await provider.restore.restoreVmVolumeCleanup(FIRST, DISK);
    await provider.restore.restoreVmInit(SECOND, never);
    await provider.restore.restoreVmVolumeInit(SECOND, DISK, never);
    for (let time = 0; time < 2; time++) await provider.restore.restoreVmVolumeCleanup(SECOND, DISK);
    await provider.restore.restoreVmVolumeInit(SECOND, DISK, never);
    for (let time = 0; time < 2; time++) await provider.restore.restoreVmCleanup(SECOND);
    expect(await readdir(path.join(node.root, "run/pve-backup-host"))).toEqual([]);
    expect(await readdir(path.join(node.storePath, "100/.locks")).catch(() => [])).toEqual([]);
  });

  it("works while a backup of the same guest runs, and the backup works meanwhile", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 2000, oracleDir: `${node.dir}/o2` });
    await expectRestores(node, first);
    await copyDisks(provider, guest, access);
    await access.finish(true);
    await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never);
    await expectRestores(node, { volname: SECOND, oracles: access.oracles });
  });
});

describe("guest and firewall config", () => {
  it.each([
    ["text that is not UTF-8, with CRLF and NUL", Buffer.from("name: caf\xe9\r\n#\x80\xff\0\r\n\n no end", "latin1")],
    ["random bytes", randomBytes(20_000)],
  ])("come back byte for byte: %s", async (_what, bytes) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const config = Buffer.concat([Buffer.from(guest.guestConfig), bytes]);
    await using provider = node.provider();
    await provider.backup.backupInit(VMID, "qemu", 1000, never);
    await using access = await guest.openBackup();
    const info = { bandwidthLimit: 0, firewallConfig: bytes };
    await provider.backup.backupVm(VMID, config, access.vmVolumes(), info, never);
    const restored = await restore(node, FIRST, async () => undefined);
    expect(restored.guestConfig.equals(config)).toBe(true);
    expect(restored.firewallConfig?.equals(bytes)).toBe(true);
    expect((await readFile(path.join(node.storePath, "100/qemu-1000/guest.conf"))).equals(config)).toBe(true);
  });

  it("tell an empty firewall config from none", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000, firewallConfig: Buffer.alloc(0) });
    await mustBackUp(node, guest, { epoch: 2000 });
    await using provider = node.provider();
    expect(await provider.restore.archiveGetFirewallConfig(FIRST, never)).toEqual(Buffer.alloc(0));
    expect(await provider.restore.archiveGetFirewallConfig(SECOND, never)).toBeUndefined();
  });
});

describe("a damaged chain", () => {
  const damages: ReadonlyArray<readonly [string, RegExp, (node: TestNode) => Promise<unknown>]> = [
    ["whose base is gone", /qemu-1000/, (node) => rm(path.dirname(imageOf(node, 1000)), { recursive: true })],
    ["whose base lost bytes", /has 131072 bytes/, (node) => truncate(imageOf(node, 1000), 131_072)],
    ["whose base has another header", /header/, (node) => overwrite(imageOf(node, 1000), 200)],
    ["whose top has another header", /header/, (node) => overwrite(imageOf(node, 2000), 200)],
    ["whose top is a link", /not a regular file/, (node) => replaceByLink(imageOf(node, 2000))],
    ["whose base is a link", /not a regular file/, (node) => replaceByLink(imageOf(node, 1000))],
    ["whose base has a table that points nowhere", /tables of ".*qemu-1000.*" are damaged/, breakTables],
    ["whose header names another file", /backing|header/, rebaseElsewhere],
  ];

  it.each(damages)("%s is refused with the reason before anything is offered", async (_what, reason, damage) => {
    await using node = await TestNode.create();
    await twoPoints(node);
    await damage(node);
    await using provider = node.provider();
    const { code, message } = await refusalOf(provider.restore.restoreVmInit(SECOND, never));
    expect(code).toMatch(/^(DAMAGED|NOT_FOUND)$/);
    expect(message).toMatch(reason);
    expect(message).toMatch(/^Cannot [^\n]+$/);
    await provider.restore.restoreVmCleanup(SECOND);
    expect(await readdir(path.join(node.root, "run/pve-backup-host")).catch(() => [])).toEqual([]);
  });
});

async function overwrite(file: string, at: number): Promise<void> {
  await using handle = await open(file, "r+");
  await handle.write(Buffer.of(0x5a), 0, 1, at);
}

/** Neither size nor header show it: the first entry of the L1 table, whose place the header names at 40. */
async function breakTables(node: TestNode): Promise<void> {
  await using handle = await open(imageOf(node, 1000), "r+");
  const place = Buffer.alloc(8);
  await handle.read(place, 0, 8, 40);
  await handle.write(Buffer.from("80000fff00000000", "hex"), 0, 8, Number(place.readBigUInt64BE(0)));
}

async function replaceByLink(file: string): Promise<void> {
  await rename(file, `${file}.real`);
  await symlink(`${path.basename(file)}.real`, file);
}

/** As an attacker on the share would: a file of the host becomes part of the disk. */
async function rebaseElsewhere(node: TestNode): Promise<void> {
  const secret = path.join(node.dir, "secret.qcow2");
  await copyFile(imageOf(node, 1000), secret);
  await writeFile(path.join(node.dir, "x"), "");
  await runTool("qemu-img", ["rebase", "-u", "-b", secret, "-F", "qcow2", imageOf(node, 2000)]);
}
