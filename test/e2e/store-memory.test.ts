// SPDX-License-Identifier: AGPL-3.0-or-later
// The store remembers which backup was the newest. A witness from before it must not come true again when that
// backup is gone: the bitmap was cleared for it, and says nothing of what it held.
import { copyFile, cp, readFile, rename, rm, symlink, writeFile } from "node:fs/promises";
import path from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { onRename, resetFileHooks } from "../support/fault/file-hooks.ts";
import { TestNode } from "../support/node/test-node.ts";
import { DISK, expectRestores, MIB, modeOf, mustBackUp, type SafeBackup, startGuest } from "../support/vm/vm-rules.ts";

const at = (epoch: number): string => `backup/100/qemu-${epoch}`;
const folderOf = (node: TestNode, epoch: number): string => path.join(node.storePath, `100/qemu-${epoch}`);
const stateOf = (node: TestNode): string => path.join(node.storePath, "100/state.json");

/** A full backup that gives a reason of its own, and is right. */
async function expectFull(node: TestNode, { job, ...point }: SafeBackup): Promise<void> {
  await expectRestores(node, point);
  expect(job.modes).toEqual(new Map([[DISK, "new"]]));
  expect(modeOf(job)).toMatch(/^full: (?!first backup$)./);
}

describe("an older witness whose backup is the newest one left", () => {
  it("is not believed after the file was put back", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const witness = path.join(node.root, "etc/pve/priv/pve-backup-host/bk/100.json");
    await mustBackUp(node, guest, { epoch: 1000 });
    await copyFile(witness, `${node.dir}/old-witness`);
    await guest.write(DISK, 8 * MIB, seededBytes("only the second holds it", MIB));
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe(`incremental since ${at(1000)}`);

    await rm(folderOf(node, 2000), { recursive: true });
    await copyFile(`${node.dir}/old-witness`, witness);
    expect(await readFile(stateOf(node), "utf8")).toContain("100/qemu-2000");
    await guest.write(DISK, 16 * MIB, seededBytes("since", MIB));
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    await expectFull(node, third);
    expect(modeOf((await mustBackUp(node, guest, { epoch: 4000 })).job)).toBe(`incremental since ${at(3000)}`);
  });

  it("is not believed on the other one of two clusters that back up the same QEMU", async () => {
    await using here = await TestNode.create();
    await using there = await TestNode.create({ path: here.storePath });
    await using guest = await startGuest(here);
    await mustBackUp(here, guest, { epoch: 1000 });
    await guest.write(DISK, 8 * MIB, seededBytes("only the other cluster's holds it", MIB));
    await know(there, guest);
    const second = await mustBackUp(there, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toMatch(/^full: /); // it starts the bitmap anew

    await rm(folderOf(here, 2000), { recursive: true });
    await guest.write(DISK, 16 * MIB, seededBytes("since", MIB));
    await expectFull(here, await mustBackUp(here, guest, { epoch: 3000 }));
  });
});

/** The files by which a node knows a running guest. */
async function know(node: TestNode, guest: LabGuest): Promise<void> {
  for (const folder of ["etc/pve/qemu-server", "run/qemu-server"]) {
    await cp(path.join(guest.root, folder), path.join(node.root, folder), { recursive: true });
  }
}

describe("a state.json that does not name the newest backup", () => {
  const damages: ReadonlyArray<readonly [string, (file: string) => Promise<unknown>]> = [
    ["is missing", (file) => rm(file)],
    ["is empty", (file) => writeFile(file, "")],
    ["is cut", async (file) => writeFile(file, (await readFile(file)).subarray(0, 90))],
    ["is no JSON", (file) => writeFile(file, "once upon a time\n")],
    ["names another backup", (file) => change(file, /("uuid": ?")[0-9a-f]{8}/, "$100000000")],
    ["names no backup of this storage", (file) => change(file, '"bk"', '"other"')],
    ["is a link to itself elsewhere", moveAndLink],
  ];

  it.each(damages)("makes the next backup full if it %s, and says so", async (_what, damage) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await damage(stateOf(node));
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    await expectFull(node, second);
    expect(second.job.log.join("\n")).toContain("state.json");
    await guest.write(DISK, 16 * MIB, seededBytes("third", MIB));
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(third.job)).toBe(`incremental since ${at(2000)}`);
    await expectRestores(node, first, third);
  });
});

describe("a state.json that could not be written at the commit", () => {
  afterEach(resetFileHooks);

  it("costs no backup, but the next one is full", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    const hasCome = onRename(
      (_from, to) => to.endsWith("/state.json"),
      () => {
        throw Object.assign(new Error("EIO: injected"), { code: "EIO", syscall: "rename" });
      },
    );
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(hasCome()).toBe(true);
    expect(second.job.log.join("\n")).toMatch(/^warn: .*complete.*state\.json/m);
    await guest.write(DISK, 16 * MIB, seededBytes("third", MIB));
    await expectFull(node, await mustBackUp(node, guest, { epoch: 3000 }));
    await expectRestores(node, second);
    expect(modeOf((await mustBackUp(node, guest, { epoch: 4000 })).job)).toBe(`incremental since ${at(3000)}`);
  });
});

async function change(file: string, from: string | RegExp, to: string): Promise<void> {
  const text = await readFile(file, "utf8");
  const other = text.replace(from, to);
  if (other === text) throw new Error(`${file} has nothing like ${from}`);
  await writeFile(file, other);
}

async function moveAndLink(file: string): Promise<void> {
  const elsewhere = path.join(path.dirname(file), "../state-elsewhere.json");
  await rename(file, elsewhere);
  await symlink(elsewhere, file);
}
