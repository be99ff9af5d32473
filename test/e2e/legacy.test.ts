// SPDX-License-Identifier: AGPL-3.0-or-later
// Backups that the upstream example left in the same folder: no manifest, absolute backing paths.
import { copyFile, mkdir, readdir, rename, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { type LabGuest, runTool, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { list, restore } from "../support/vm/vm-job.ts";
import {
  DISK,
  DISK_BYTES,
  expectRestores,
  MIB,
  modeOf,
  mustBackUp,
  never,
  startGuest,
  VMID,
} from "../support/vm/vm-rules.ts";

interface LegacyPoint {
  readonly volname: string;
  readonly oracles: ReadonlyMap<string, string>;
}

/** What the example leaves: configs, one qcow2 per disk, and the absolute path of its base in the header. */
async function makeLegacy(node: TestNode, guest: LabGuest, epoch: number, baseEpoch?: number): Promise<LegacyPoint> {
  const folder = path.join(node.storePath, `100/qemu-${epoch}`);
  await mkdir(folder, { recursive: true });
  await writeFile(path.join(folder, "guest.conf"), guest.guestConfig);
  await writeFile(path.join(folder, "firewall.conf"), "[OPTIONS]\r\n");
  const oracle = path.join(node.dir, `legacy-${epoch}.raw`);
  await guest.copyDisk(DISK, oracle);
  const image = path.join(folder, `${DISK}.qcow2`);
  const base = path.join(node.storePath, `100/qemu-${baseEpoch}/${DISK}.qcow2`);
  const backing = baseEpoch === undefined ? [] : ["-B", base, "-F", "qcow2"];
  await runTool("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", ...backing, oracle, image]);
  return { volname: `backup/100/qemu-${epoch}`, oracles: new Map([[DISK, oracle]]) };
}

describe("folders of the upstream example", () => {
  it("are listed and restore bit for bit, also after the store has moved", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await makeLegacy(node, guest, 100);
    await guest.write(DISK, 10 * MIB, seededBytes("second", MIB));
    const second = await makeLegacy(node, guest, 200, 100);
    await expectRestores(node, first, second);
    const moved = path.join(node.dir, "moved");
    await rename(node.storePath, moved);
    await using elsewhere = await TestNode.create({ path: moved });
    expect(await list(elsewhere, VMID)).toEqual([first.volname, second.volname]);
    await expectRestores(elsewhere, first, second);
    const restored = await restore(elsewhere, second.volname, async (_device, _path, size) => {
      expect(size).toBe(DISK_BYTES);
    });
    expect(restored.guestConfig.toString()).toBe(guest.guestConfig);
    expect(restored.firewallConfig?.toString()).toBe("[OPTIONS]\r\n");
  });

  it("are never built on, neither at first nor when one appears in between: then all is read", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const legacy = await makeLegacy(node, guest, 100);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    expect(first.job.modes).toEqual(new Map([[DISK, "new"]]));
    expect(modeOf(first.job)).toBe("full: first backup");
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe("incremental since backup/100/qemu-1000"); // it was there before
    await guest.write(DISK, 10 * MIB, seededBytes("third", MIB));
    const between = await makeLegacy(node, guest, 500, 100); // older by its name
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(third.job.modes).toEqual(new Map([[DISK, "new"]]));
    expect(modeOf(third.job)).toBe("full: an unknown directory qemu-500 appeared");
    await using provider = node.provider();
    const parents = (await provider.storage.listVolumes(VMID, never)).map(({ volname, parent }) => [volname, parent]);
    expect(new Map(parents as Array<[string, string | undefined]>)).toEqual(
      new Map([
        [legacy.volname, undefined],
        [between.volname, undefined],
        ["backup/100/qemu-1000", undefined],
        ["backup/100/qemu-2000", "backup/100/qemu-1000"],
        ["backup/100/qemu-3000", "backup/100/qemu-2000"],
      ]),
    );
    await expectRestores(node, legacy, between, first, second, third);
  });

  it("that are not whole are not listed: a disk of the config is missing", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await makeLegacy(node, guest, 100);
    const folder = path.join(node.storePath, "100/qemu-200");
    await mkdir(folder);
    await copyFile(path.join(node.storePath, "100/qemu-100/guest.conf"), path.join(folder, "guest.conf"));
    expect(await list(node, VMID)).toEqual(["backup/100/qemu-100"]);
    expect(await readdir(folder)).toEqual(["guest.conf"]); // and nothing is removed
  });
});
