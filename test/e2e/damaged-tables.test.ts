// SPDX-License-Identifier: AGPL-3.0-or-later
// An image whose size and header are right, but whose tables are lost, reads as zeroes without an error.
import { open, readFile } from "node:fs/promises";
import path from "node:path";
import { expect, it } from "vitest";
import { compareRaw, LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { backUp, restore } from "../support/vm/vm-job.ts";

const MIB = 2 ** 20;

/** Overwrites the first entry of the L1 table with zeroes. Source: qcow2, header bytes 40 to 47. */
async function loseFirstL2(image: string): Promise<void> {
  const l1Offset = Number((await readFile(image)).readBigUInt64BE(40));
  await using handle = await open(image, "r+");
  await handle.write(Buffer.alloc(8), 0, 8, l1Offset);
}

it("a backup with lost tables is neither restored nor built on", async () => {
  await using node = await TestNode.create();
  await using guest = await LabGuest.start({
    dir: path.join(node.dir, "vm"),
    root: node.root,
    vmid: 100,
    storeid: node.storeid,
    disks: [{ device: "drive-scsi0", sizeBytes: 16 * MIB }],
  });
  await guest.write("drive-scsi0", 0, seededBytes(1, 3 * MIB));
  const full = await backUp(node, guest, { epoch: 1_700_000_000 });
  const image = path.join(node.storePath, "100/qemu-1700000000/drive-scsi0.qcow2");
  await loseFirstL2(image);

  const taken: string[] = [];
  const restored = restore(node, full.volname ?? "", async (device) => void taken.push(device));
  await expect(restored).rejects.toThrow(
    /^Cannot restore "backup\/100\/qemu-1700000000": the tables of ".*" are damaged/,
  );
  expect(taken).toEqual([]);

  const next = await backUp(node, guest, { epoch: 1_700_000_100, oracleDir: path.join(node.dir, "oracle") });
  expect(next.modes.get("drive-scsi0")).toBe("new");
  expect(next.log.join("\n")).toMatch(/full backup of 16\.0 MiB \(its base cannot be used: Cannot build on .*damaged/);
  await restore(node, next.volname ?? "", async (device, raw) => {
    expect(await compareRaw(raw, next.oracles.get(device) ?? "")).toMatchObject({ identical: true });
  });
});
