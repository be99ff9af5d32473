// SPDX-License-Identifier: AGPL-3.0-or-later
// Where QEMU's bitmap tells nothing, all of the disk is read, and what differs from the newest backup is stored. No
// record is trusted for that: content is compared.
import { readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { type LabGuest, runTool, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { DISK, expectRestores, MIB, mustBackUp, startGuest } from "../support/vm/vm-rules.ts";

const imageOf = (node: TestNode, epoch: number): string => path.join(node.storePath, `100/qemu-${epoch}/${DISK}.qcow2`);

async function backingOf(node: TestNode, epoch: number): Promise<string | undefined> {
  const info = JSON.parse(await runTool("qemu-img", ["info", "--output=json", imageOf(node, epoch)]));
  return (info as { "backing-filename"?: string })["backing-filename"];
}

const lineOf = (log: readonly string[]): string => log.find((line) => line.startsWith(`info: ${DISK}: `)) ?? "none";

const OTHER_VMGENID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

type Lose = (node: TestNode, guest: LabGuest) => Promise<unknown>;
const LOSSES: Array<[string, Lose, RegExp]> = [
  ["QEMU was started anew", (_node, guest) => guest.restart(), /QEMU has no bitmap of it, or started a new one/],
  ["the guest was rolled back", (_node, guest) => guest.setVmgenid(OTHER_VMGENID), /vmgenid changed \(rollback\)/],
  [
    "the record of the last backup is gone",
    (node) => rm(path.join(node.root, "etc/pve/priv/pve-backup-host"), { recursive: true }),
    /there is no record here of a last backup through this storage/,
  ],
  ["state.json is gone", (node) => rm(path.join(node.storePath, "100/state.json")), /state\.json is missing/],
  [
    "the newest backup is gone",
    (node) => rm(path.join(node.storePath, "100/qemu-2000"), { recursive: true }),
    /the last backup through this storage is not here/,
  ],
  [
    "an unknown directory appeared",
    (node) => writeFolder(path.join(node.storePath, "100/qemu-1500")),
    /directory qemu-1500 .*|an unknown directory qemu-1500 appeared/,
  ],
];

async function writeFolder(folder: string): Promise<void> {
  await runTool("mkdir", [folder]);
  await writeFile(path.join(folder, "guest.conf"), "name: who\n");
}

describe("a lost bitmap costs time, not space", () => {
  it.each(LOSSES)("when %s", async (_what, lose, why) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await guest.write(DISK, 8 * MIB, seededBytes("much", 8 * MIB));
    const points = [await mustBackUp(node, guest, { epoch: 1000 })];
    await guest.write(DISK, 9 * MIB, seededBytes("some", 64 * 1024));
    points.push(await mustBackUp(node, guest, { epoch: 2000 }));
    await lose(node, guest);
    const left = (await readdir(path.join(node.storePath, "100"))).includes("qemu-2000") ? 2000 : 1000;
    await guest.write(DISK, 12 * MIB, seededBytes("more", 64 * 1024));
    await guest.writeZeroes(DISK, 14 * MIB, MIB);
    const last = await mustBackUp(node, guest, { epoch: 3000 });
    expect(lineOf(last.job.log)).toMatch(
      new RegExp(`incremental backup since "backup/100/qemu-${left}", all of .* is read \\((?:${why.source})`),
    );
    expect([...last.job.modes.values()]).not.toContain(why.source.startsWith("QEMU has") ? "none" : "use");
    expect(await backingOf(node, 3000)).toBe(`../qemu-${left}/${DISK}.qcow2`);
    expect((await stat(imageOf(node, 3000))).size).toBeLessThan(MIB);
    await expectRestores(node, ...points.filter(({ volname }) => left === 2000 || !volname.endsWith("2000")), last);
    const next = await mustBackUp(node, guest, { epoch: 4000 });
    expect(lineOf(next.job.log)).toMatch(/incremental backup \(.* changed since "backup\/100\/qemu-3000"\)/);
    await expectRestores(node, next);
  });
});

describe("dir-full-read-every", () => {
  const DAY = 86_400;

  it("finds what a lying bitmap hid, after so many days and not before", async () => {
    await using node = await TestNode.create({ "dir-compression": "none", "dir-full-read-every": 7 });
    await using guest = await startGuest(node);
    const points = [await mustBackUp(node, guest, { epoch: 10 * DAY })];
    await guest.write(DISK, 9 * MIB, seededBytes("hidden", 64 * 1024));
    await guest.clearBitmap(DISK);
    const before = await mustBackUp(node, guest, { epoch: 17 * DAY - 1 });
    expect(lineOf(before.job.log)).toMatch(/incremental backup \(0 B of .* changed since/);
    const due = await mustBackUp(node, guest, { epoch: 17 * DAY });
    expect([...due.job.modes.values()]).toEqual(["new"]);
    expect(lineOf(due.job.log)).toMatch(
      /all of .* is read \(all of it was last read 7 days ago, see dir-full-read-every\)$/,
    );
    expect((await stat(imageOf(node, 17 * DAY))).size).toBeLessThan(MIB);
    points.push(due);
    const next = await mustBackUp(node, guest, { epoch: 18 * DAY });
    expect([...next.job.modes.values()]).toEqual(["use"]); // the newest full read counts
    await expectRestores(node, ...points, next);
  });

  it("never reads everything where it is 0", async () => {
    await using node = await TestNode.create({ "dir-full-read-every": "0" });
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    expect([...(await mustBackUp(node, guest, { epoch: 5000 * DAY })).job.modes.values()]).toEqual(["use"]);
  });
});

describe("a full image is written", () => {
  it("where the newest backup has no digests", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    const file = path.join(node.storePath, "100/qemu-1000/manifest.json");
    const manifest = JSON.parse(await readFile(file, "utf8")) as { files: { name: string }[] };
    const files = manifest.files.filter(({ name }) => !name.endsWith(".digests"));
    await writeFile(file, JSON.stringify({ ...manifest, files }));
    await guest.setVmgenid(OTHER_VMGENID);
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(lineOf(second.job.log)).toMatch(/full backup of .* \(vmgenid changed \(rollback\)\)$/);
    expect(await backingOf(node, 2000)).toBeUndefined();
    await expectRestores(node, second);
  });

  it("where its digests cannot be read", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await writeFile(path.join(node.storePath, `100/qemu-1000/${DISK}.digests`), Buffer.alloc(8192));
    await guest.setVmgenid(OTHER_VMGENID);
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(lineOf(second.job.log)).toMatch(/full backup of .* \(vmgenid changed \(rollback\)\)$/);
    expect(await backingOf(node, 2000)).toBeUndefined();
    await expectRestores(node, second);
  });
});
