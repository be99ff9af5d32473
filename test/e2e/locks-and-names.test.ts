// SPDX-License-Identifier: AGPL-3.0-or-later
// Who may write, under which names, and who may read it afterwards.
import { lstat, mkdir, readdir } from "node:fs/promises";
import { hostname } from "node:os";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { TestNode } from "../support/node/test-node.ts";
import { backUp, list } from "../support/vm/vm-job.ts";
import {
  copyDisks,
  DISK,
  DISK_BYTES,
  expectRestores,
  mustBackUp,
  never,
  openJob,
  refusalOf,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

describe("two backups of one VM at once", () => {
  it("the second is refused with who holds the guest, and disturbs the first in nothing", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using first = node.provider();
    const { access } = await openJob(first, guest, { epoch: 1000, oracleDir: `${node.dir}/oracle` });
    await using second = node.provider();
    const refusal = await refusalOf(second.backup.backupInit(VMID, "qemu", 2000, never));
    expect(refusal.code).toBe("LOCKED");
    expect(refusal.message).toMatch(
      new RegExp(`^Cannot lock guest 100: it is in use by process ${process.pid} on ${hostname()} since 20`),
    );
    await second.backup.backupCleanup(VMID, undefined, false, refusal.message, never);
    await second.backup.jobCleanup(never);
    await copyDisks(first, guest, access);
    await access.finish(true);
    await first.backup.backupCleanup(VMID, "qemu", true, undefined, never);
    await expectRestores(node, { volname: "backup/100/qemu-1000", oracles: access.oracles });
  });

  it("other guests are free", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await using first = node.provider();
    await first.backup.backupInit(guest.vmid, "qemu", 1000, never);
    await using second = node.provider();
    expect(await second.backup.backupInit(101, "qemu", 1000, never)).toEqual({ archiveName: "101/qemu-1000" });
  });
});

describe("a second backup in the same second", () => {
  it("is refused in one sentence, and the first one stays as it is", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    const again = await backUp(node, guest, { epoch: 1000 });
    expect(again.error).toMatchObject({
      code: "EXISTS",
      message: 'Cannot create "backup/100/qemu-1000": a backup with this timestamp already exists',
    });
    expect(await list(node, VMID)).toEqual([first.volname]);
    await expectRestores(node, first);
    expect((await mustBackUp(node, guest, { epoch: 1001 })).job.modes).toEqual(new Map([[DISK, "use"]]));
  });

  it("is refused although only a folder without sense has the name", async () => {
    await using node = await TestNode.create();
    await mkdir(path.join(node.storePath, "100/qemu-1000"), { recursive: true });
    await using provider = node.provider();
    expect((await refusalOf(provider.backup.backupInit(VMID, "qemu", 1000, never))).code).toBe("EXISTS");
  });
});

describe("a device name that must not become a file name", () => {
  const evil = ["../x", "..", "a/b", "a b", "a\0b", "x".repeat(300), "", "-rf", ".hidden"];

  it.each(evil)("%j is refused by the question and by the backup, before anything is written", async (name) => {
    await using node = await TestNode.create();
    await using provider = node.provider();
    await provider.backup.backupInit(VMID, "qemu", 1000, never);
    const sizes = new Map([[name, { size: DISK_BYTES }]]);
    expect((await refusalOf(provider.backup.backupVmQueryIncremental(VMID, sizes, never))).message).toMatch(
      /^Cannot use device name "/,
    );
    const volume = { size: DISK_BYTES, bitmapMode: "none", nbdPath: "/nowhere", bitmapName: undefined } as const;
    const info = { bandwidthLimit: 0, firewallConfig: undefined };
    const volumes = new Map([
      [DISK, volume],
      [name, volume],
    ]);
    const refusal = await refusalOf(provider.backup.backupVm(VMID, Buffer.from("x"), volumes, info, never));
    expect(refusal).toMatchObject({
      code: "INVALID_PARAMS",
      message: expect.stringMatching(/^Cannot use device name/),
    });
    expect(refusal.message.length).toBeLessThan(250);
    const [staging = ""] = (await readdir(path.join(node.storePath, "100"))).filter((one) =>
      one.startsWith(".staging"),
    );
    expect(await readdir(path.join(node.storePath, "100", staging))).toEqual([]);
    await provider.backup.backupCleanup(VMID, "qemu", false, refusal.message, never);
    expect(await readdir(path.join(node.storePath, "100"))).toEqual([]);
    expect(await readdir(node.dir)).toEqual(expect.arrayContaining(["root", "store"]));
    expect(await readdir(node.dir)).toHaveLength(2);
  });

  it.each([99, 0, -1, 1.5, Number.NaN])("the guest id %d is refused", async (vmid) => {
    await using node = await TestNode.create();
    await using provider = node.provider();
    expect((await refusalOf(provider.backup.backupInit(vmid, "qemu", 1000, never))).code).toBe("INVALID_PARAMS");
    expect(await readdir(node.storePath)).toEqual([]);
  });

  it.each([-5, 1.5, Number.NaN, 1e15])("the time %d is refused", async (epoch) => {
    await using node = await TestNode.create();
    await using provider = node.provider();
    expect((await refusalOf(provider.backup.backupInit(VMID, "qemu", epoch, never))).code).toBe("INVALID_PARAMS");
    expect(await list(node, VMID)).toEqual([]);
  });
});

describe("what is written", () => {
  it("can be read by its owner only, whatever the umask is", async () => {
    const umask = process.umask(0);
    try {
      await using node = await TestNode.create();
      await using guest = await startGuest(node);
      await mustBackUp(node, guest, { epoch: 1000, firewallConfig: Buffer.from("[OPTIONS]\n") });
      await backUp(node, guest, { epoch: 2000, failAt: "query" });
      await using provider = node.provider();
      await provider.storage.updateVolumeAttribute("backup/100/qemu-1000", "notes", "secret", never);
      const modes = new Map<string, string>();
      for (const folder of [node.storePath, path.join(node.root, "etc/pve/priv")]) {
        for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
          const file = path.join(entry.parentPath, entry.name);
          modes.set(path.relative(folder, file), ((await lstat(file)).mode & 0o7777).toString(8));
          expect(modes.get(path.relative(folder, file)), file).toBe(entry.isDirectory() ? "700" : "600");
        }
      }
      expect([...modes.keys()]).toEqual(
        expect.arrayContaining([
          ...["guest.conf", "firewall.conf", `${DISK}.qcow2`, "manifest.json", "backup.log", "attributes.json"].map(
            (name) => `100/qemu-1000/${name}`,
          ),
          ...["100/state.json", "100/failed/qemu-2000.log", "pve-backup-host/bk/100.json"],
        ]),
      );
    } finally {
      process.umask(umask);
    }
  });
});
