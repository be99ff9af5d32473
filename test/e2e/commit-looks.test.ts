// SPDX-License-Identifier: AGPL-3.0-or-later
// Somebody who can write to the share acts between the last check of a backup and the rename that publishes it. The
// job must notice: PVE clears the bitmap as soon as it is told of success.
import { cpSync, readdirSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import path from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { backUpContainer, CT_VMID } from "../support/container/container-point.ts";
import { onRename, resetFileHooks } from "../support/fault/file-hooks.ts";
import { TestNode } from "../support/node/test-node.ts";
import { backUp, list } from "../support/vm/vm-job.ts";
import { DISK, expectRestores, MIB, modeOf, mustBackUp, never, startGuest, VMID } from "../support/vm/vm-rules.ts";

const IMAGE = `${DISK}.qcow2`;
const FAILED = "backup/100/qemu-2000";

afterEach(resetFileHooks);

/** What is done to the staging folder; synchronously, so that nothing of the product runs meanwhile. */
const attacks: ReadonlyArray<readonly [string, (staging: string, node: TestNode) => void]> = [
  ["lost its disk", (staging) => rmSync(path.join(staging, IMAGE))],
  ["lost its guest config", (staging) => rmSync(path.join(staging, "guest.conf"))],
  ["lost its manifest", (staging) => rmSync(path.join(staging, "manifest.json"))],
  ["lost everything", emptyIt],
  ["became a link to a copy", (staging, node) => replaceBy(staging, node, (copy) => symlinkSync(copy, staging))],
  ["became a folder of the same content", (staging, node) => replaceBy(staging, node, (copy) => copyTo(copy, staging))],
  ["got a firewall config", (staging) => writeFileSync(path.join(staging, "firewall.conf"), "[OPTIONS]\nenable: 0\n")],
  ["got a file of another name", (staging) => writeFileSync(path.join(staging, "note.txt"), "hello\n")],
  ["has another disk of the same size", (staging) => exchange(path.join(staging, IMAGE))],
  ["has another guest config of the same size", (staging) => exchange(path.join(staging, "guest.conf"))],
  ["has another manifest of the same size", (staging) => exchange(path.join(staging, "manifest.json"))],
];

function emptyIt(staging: string): void {
  for (const name of readdirSync(staging)) rmSync(path.join(staging, name));
}

function replaceBy(staging: string, node: TestNode, put: (copy: string) => void): void {
  const copy = path.join(node.dir, "copy");
  renameSync(staging, copy);
  put(copy);
}

function copyTo(copy: string, staging: string): void {
  cpSync(copy, staging, { recursive: true });
}

/** Another file takes the name: its last byte is another one. */
function exchange(file: string): void {
  const bytes = readFileSync(file);
  bytes.writeUInt8((bytes.at(-1) ?? 0) ^ 1, bytes.length - 1);
  writeFileSync(`${file}.new`, bytes, { mode: 0o600 });
  renameSync(`${file}.new`, file);
}

describe("a staging folder that, right before it is published,", () => {
  it.each(attacks)("%s fails the job, and the next backup is full and right", async (_what, attack) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    const guestFolder = path.join(node.storePath, String(VMID));
    const hasCome = onRename(
      (_from, to) => to.endsWith("/qemu-2000"),
      () => attack(path.join(guestFolder, stagingIn(guestFolder)), node),
    );
    const failed = await backUp(node, guest, { epoch: 2000 });
    expect(hasCome()).toBe(true);
    expect(String(failed.error)).toMatch(/^\w+: Cannot [^\n]+$/);

    await expectNoFirewallConfig(node, VMID, FAILED);
    await guest.write(DISK, 16 * MIB, seededBytes("third", MIB));
    const third = await mustBackUp(node, guest, { epoch: 3000 });
    expect(third.job.modes).toEqual(new Map([[DISK, "new"]]));
    await expectRestores(node, first, third);
    const fourth = await mustBackUp(node, guest, { epoch: 4000 });
    expect(modeOf(fourth.job)).toBe("incremental since backup/100/qemu-3000");
  });
});

describe("a container's staging folder that, right before it is published,", () => {
  const ofContainer: ReadonlyArray<readonly [string, (staging: string) => void]> = [
    ["lost its archive", (staging) => rmSync(path.join(staging, "archive.tar"))],
    ["has another archive of the same size", (staging) => exchange(path.join(staging, "archive.tar"))],
    ["got a firewall config", (staging) => writeFileSync(path.join(staging, "firewall.conf"), "[OPTIONS]\n")],
  ];

  it.each(ofContainer)("%s fails the job, and the next backup works", async (_what, attack) => {
    await using node = await TestNode.create();
    const guestFolder = path.join(node.storePath, String(CT_VMID));
    const hasCome = onRename(
      (_from, to) => to.endsWith("/lxc-1000"),
      () => attack(path.join(guestFolder, stagingIn(guestFolder))),
    );
    const job = backUpContainer(node, { epoch: 1000, format: "tar" });
    await expect(job).rejects.toThrow(/"message":"Cannot [^\n]+"/);
    expect(hasCome()).toBe(true);
    await expectNoFirewallConfig(node, CT_VMID, `backup/${CT_VMID}/lxc-1000`);
    const next = await backUpContainer(node, { epoch: 2000, format: "tar" });
    expect(await list(node, CT_VMID)).toContain(next);
  });
});

function stagingIn(guestFolder: string): string {
  return readdirSync(guestFolder).find((name) => name.startsWith(".staging-")) ?? "no staging folder";
}

/** None was backed up. What the failed job left may be listed or not. */
async function expectNoFirewallConfig(node: TestNode, vmid: number, failed: string): Promise<void> {
  await using provider = node.provider();
  for (const volname of await list(node, vmid)) {
    const config = await provider.restore.archiveGetFirewallConfig(volname, never).catch((error: unknown) => {
      if (volname === failed) return undefined;
      throw error;
    });
    expect(config, volname).toBeUndefined();
  }
}
