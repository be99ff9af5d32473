// SPDX-License-Identifier: AGPL-3.0-or-later
// Somebody removes a backup, by hand and without asking for a lock, while it is being restored: what is on offer
// stays as it was or fails, what is asked for later is refused in one sentence, and nothing is left behind.
import { mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { setImmediate } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { compareRaw, runTool, seededBytes } from "../../fixtures/lab/index.ts";
import { packTree, playArchiver } from "../support/container/archiver.ts";
import { TestNode } from "../support/node/test-node.ts";
import { list } from "../support/vm/vm-job.ts";
import { VmLedger } from "../support/vm/vm-ledger.ts";
import { DISK, expectRestores, MIB, modeOf, mustBackUp, never, startGuest, VMID } from "../support/vm/vm-rules.ts";

const TIMEOUT = { timeout: 180_000 };
const OTHER = "drive-scsi1";
const CTID = 200;
const SENTENCE = /^Cannot [^\n]*[^\n.]$/;

type Way = readonly [string, (guestFolder: string) => Promise<void>];
const remove = (file: string) => async (folder: string) => await rm(path.join(folder, file), { recursive: true });
const away = (name: string) => async (folder: string) =>
  await rename(path.join(folder, name), path.join(folder, `old-${name}`));

/** Its images are open: what only changes its name is served on, what is deleted is not begun. */
const WAYS: ReadonlyArray<readonly [...Way, next: "goes on" | "is refused", cleanup: "works" | "fails"]> = [
  ["the backup is renamed", away("qemu-1001"), "goes on", "works"],
  ["the backup is deleted", remove("qemu-1001"), "is refused", "works"],
  ["its base is renamed", away("qemu-1000"), "goes on", "works"],
  ["its base is deleted", remove("qemu-1000"), "is refused", "works"],
  ["one image of its base is deleted", remove(`qemu-1000/${OTHER}.qcow2`), "is refused", "works"],
  ["the whole guest is deleted, with the restore's own lock", remove("."), "is refused", "fails"],
];

describe("a VM's restore during which", () => {
  it.each(WAYS)("%s", TIMEOUT, async (_what, act, next, cleanup) => {
    await using node = await TestNode.create();
    const disks = [DISK, OTHER].map((device) => ({ device, sizeBytes: 8 * MIB }));
    await using guest = await startGuest(node, { disks });
    const ledger = new VmLedger(node, guest);
    await ledger.backUp();
    await guest.write(DISK, 6 * MIB, seededBytes("second", MIB));
    await guest.write(OTHER, MIB, seededBytes("other", MIB));
    await ledger.backUp();
    const [volname = "", oracles = new Map<string, string>()] = [...ledger.points].at(-1) ?? [];
    {
      await using provider = node.provider();
      await provider.restore.restoreVmInit(volname, never);
      const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(volname, DISK, never);
      await act(path.join(node.storePath, String(VMID)));
      expect(await compareRaw(qemuImgPath, oracles.get(DISK) ?? "none")).toMatchObject({ identical: true });
      const second = provider.restore.restoreVmVolumeInit(volname, OTHER, never);
      if (next === "is refused") await expect(second).rejects.toThrow(SENTENCE);
      else {
        const right = await compareRaw((await second).qemuImgPath, oracles.get(OTHER) ?? "none");
        expect(right).toMatchObject({ identical: true });
      }
      const given = provider.restore.restoreVmVolumeCleanup(volname, DISK);
      if (cleanup === "fails") await expect(given).rejects.toThrow(/its lock file is gone$/);
      else await given;
      await provider.restore.restoreVmCleanup(volname);
      expect(await readdir(path.join(node.root, "run/pve-backup-host"))).toEqual([]);
      await expect(provider.restore.restoreVmInit(volname, never)).rejects.toThrow(SENTENCE);
    }
    await expectOnlyRightBackups(node, ledger);
  });
});

/** With what is left lying about: the next backup is right, and what is listed restores, or says what is missing. */
async function expectOnlyRightBackups(node: TestNode, ledger: VmLedger): Promise<void> {
  const next = await mustBackUp(node, ledger.guest, { epoch: 3000 });
  expect(modeOf(next.job)).toMatch(/^full: /);
  ledger.add(next.volname, next.oracles);
  const listed = await list(node, VMID);
  expect(listed).toContain(next.volname);
  for (const volname of listed) {
    const point = { volname, oracles: ledger.points.get(volname) ?? new Map<string, string>() };
    await using provider = node.provider();
    const refusal = await provider.restore.restoreVmInit(volname, never).then(
      () => undefined,
      (error: Error) => error.message,
    );
    await provider.restore.restoreVmCleanup(volname);
    if (refusal === undefined) await expectRestores(node, point);
    else expect(refusal).toMatch(/^Cannot use .*: its (base qemu-1000|file drive-scsi1\.qcow2) is missing$/);
    if (volname === next.volname) expect(refusal).toBeUndefined();
  }
}

/** A container's backup. */
async function backUpTree(node: TestNode, mode: "tar" | "squashfs"): Promise<{ volname: string; tree: string }> {
  const tree = path.join(node.dir, "tree");
  await mkdir(path.join(tree, "sbin"), { recursive: true });
  for (let n = 0; n < 12; n++) await writeFile(path.join(tree, `file${n}`), seededBytes(n, 50_000));
  await using provider = node.provider({ "lxc-backup-mode": mode });
  const { archiveName } = await provider.backup.backupInit(CTID, "lxc", 1000, never);
  const info = { directory: tree, sources: ["./"], backupUserId: 0, bandwidthLimit: 0, firewallConfig: undefined };
  const handoff = await provider.backup.backupContainerPrepare(CTID, info, never);
  await playArchiver(handoff, (archive) => packTree(mode, tree, archive));
  await provider.backup.backupCleanup(CTID, "lxc", true, undefined, never);
  return { volname: `backup/${archiveName}`, tree };
}

const ARCHIVES = { tar: "archive.tar", squashfs: "archive.sqfs" } as const;

describe("a container's restore during which the backup", () => {
  it.each([
    ["tar", "deleted", remove("lxc-1000")],
    ["tar", "renamed", away("lxc-1000")],
    ["squashfs", "deleted", remove("lxc-1000")],
    ["squashfs", "renamed", away("lxc-1000")],
  ] as const)("(%s) is %s goes on with what it has", TIMEOUT, async (mode, _what, act) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    const { volname, tree } = await backUpTree(node, mode);
    await using provider = node.provider();
    const offer = await provider.restore.restoreContainerInit(volname, never);
    const archive = await readFile(path.join(node.storePath, volname.replace("backup/", ""), ARCHIVES[mode]));
    await act(path.join(node.storePath, String(CTID)));
    if ("archiveDirectory" in offer) {
      await runTool("diff", ["-r", tree, offer.archiveDirectory]);
    } else {
      expect((await readFile(offer.tarPath)).equals(archive)).toBe(true);
    }
    await provider.restore.restoreContainerCleanup(volname);
    expect(await readdir(path.join(node.root, "run/pve-backup-host")).catch(() => [])).toEqual([]);
    await expect(provider.restore.restoreContainerInit(volname, never)).rejects.toThrow(SENTENCE);
    expect(await list(node, CTID)).toEqual([]);
    await rm(path.join(node.storePath, String(CTID)), { recursive: true });
    expect((await backUpTree(node, mode)).volname).toBe(volname);
    expect(await list(node, CTID)).toEqual([volname]);
  });
});

describe("a listing while backups are being removed", () => {
  it("never fails, and never shows one that is half gone", TIMEOUT, async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: 8 * MIB }] });
    const ledger = new VmLedger(node, guest);
    for (let n = 0; n < 4; n++) await ledger.backUp();
    const points = [...ledger.points.keys()];
    for (const [at, first] of ["manifest.json", "guest.conf", `${DISK}.qcow2`, "manifest.json"].entries()) {
      const volname = points.pop() ?? "none";
      const folder = path.join(node.storePath, volname.replace(/^backup\//, ""));
      await rm(path.join(folder, first));
      expect(await list(node, VMID), `without ${first}`).toEqual(points);
      // The rest goes while somebody lists.
      const removed = at === 3 ? rm(folder, { recursive: true }) : rename(folder, `${folder}.gone`);
      expect(await list(node, VMID)).toEqual(points);
      await removed;
    }
    expect(await list(node, VMID)).toEqual([]);
    const point = await mustBackUp(node, guest, { epoch: 3000 });
    expect(modeOf(point.job)).toMatch(/^full: the last backup through this storage is not here/);
    await expectRestores(node, point);
    expect(await list(node, VMID)).toEqual([point.volname]);
  });

  it("does not stumble over what vanishes between two looks", TIMEOUT, async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: 8 * MIB }] });
    const ledger = new VmLedger(node, guest);
    await ledger.backUp();
    const folder = path.join(node.storePath, String(VMID));
    let isOver = false;
    const flickering = (async () => {
      for (let round = 0; round < 300; round++) {
        for (const [from, to] of [
          ["qemu-1000", "away"],
          ["away", "qemu-1000"],
        ] as const) {
          await rename(path.join(folder, from), path.join(folder, to));
          await setImmediate();
        }
      }
      isOver = true;
    })();
    let lists = 0;
    for (; !isOver; lists++) expect(["", ledger.newest]).toContain((await list(node, VMID)).join());
    await flickering;
    expect(lists).toBeGreaterThan(5);
    await ledger.expectAllRight();
  });
});
