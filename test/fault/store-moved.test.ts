// SPDX-License-Identifier: AGPL-3.0-or-later
// The store's folder gets another path: between jobs, in the middle of one, and under a running restore.
import { cp, mkdir, readdir, rename, rm, symlink } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { compareRaw, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { backUp, list } from "../support/vm/vm-job.ts";
import { VmLedger } from "../support/vm/vm-ledger.ts";
import { DISK, expectRestores, MIB, never, startGuest, untilCopying, VMID } from "../support/vm/vm-rules.ts";

const TIMEOUT = { timeout: 180_000 };

describe("a store that moved between two jobs", () => {
  const moves: ReadonlyArray<readonly [string, (node: TestNode, to: string) => Promise<void>]> = [
    ["by a rename", (node, to) => node.moveStore(to)],
    [
      "by a copy, after which the old one is gone",
      async (node, to) => {
        await cp(node.storePath, to, { recursive: true, preserveTimestamps: true });
        await rm(node.storePath, { recursive: true });
        node.storePath = to;
      },
    ],
    [
      "to where a symbolic link leads",
      async (node, to) => {
        await rename(node.storePath, `${to}.real`);
        await symlink(`${to}.real`, to);
        node.storePath = to;
      },
    ],
  ];

  it.each(moves)("%s is listed, restored from and built on", TIMEOUT, async (_how, move) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const ledger = new VmLedger(node, guest);
    await ledger.backUp();
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    await ledger.backUp();
    await mkdir(path.join(node.dir, "elsewhere"));
    await move(node, path.join(node.dir, "elsewhere/new"));
    for (const [volname, oracles] of ledger.points) await expectRestores(node, { volname, oracles });
    await guest.write(DISK, 10 * MIB, seededBytes("third", MIB));
    expect(await ledger.backUp()).toBe("incremental since backup/100/qemu-1001");
    await ledger.expectAllRight();
  });

  it(
    "but stays at the old path as well: what each of them gets is right, and in full after the other",
    TIMEOUT,
    async () => {
      await using node = await TestNode.create();
      await using guest = await startGuest(node);
      const old = new VmLedger(node, guest);
      await old.backUp();
      const oldPath = node.storePath;
      const copyPath = path.join(node.dir, "copy");
      await cp(oldPath, copyPath, { recursive: true, preserveTimestamps: true });
      const copy = new VmLedger(node, guest, 2000);
      for (const [volname, oracles] of old.points) copy.add(volname, oracles);
      for (const [round, [storePath, ledger]] of (
        [
          [copyPath, copy],
          [oldPath, old],
          [copyPath, copy],
        ] as const
      ).entries()) {
        await guest.write(DISK, (8 + round) * MIB, seededBytes(round, MIB));
        node.storePath = storePath;
        const mode = await ledger.backUp();
        // The first one finds the last backup there; for the others it was made elsewhere.
        expect(mode).toMatch(
          round === 0 ? /^incremental since backup\/100\/qemu-1000$/ : /^full: the last backup .* is not here/,
        );
        await ledger.expectAllRight();
      }
    },
  );
});

describe("a store that moves during a job", () => {
  it.each(["after the question", "in mid-copy"] as const)(
    "%s: the job fails in one sentence, the next one at the new path is right",
    TIMEOUT,
    async (when) => {
      await using node = await TestNode.create({ "dir-compression": "none" });
      await using guest = await startGuest(node);
      const ledger = new VmLedger(node, guest);
      await ledger.backUp();
      await guest.write(DISK, 8 * MIB, seededBytes("second", 8 * MIB));
      const oldPath = node.storePath;
      const moved = `${oldPath}.moved`;
      const move = (): Promise<void> => rename(oldPath, moved);
      const job = await backUp(node, guest, {
        epoch: ledger.takeEpoch(),
        bandwidthLimit: 8 * MIB,
        ...(when === "in mid-copy" ? { during: () => untilCopying(node).then(move) } : { afterQuery: move }),
      });
      expect((job.error as Error).message).toMatch(/^Cannot [^\n]*[^\n.]$/);
      node.storePath = moved;
      expect(await list(node, VMID)).toEqual([ledger.newest]);
      expect(await ledger.backUp()).toBe("incremental since backup/100/qemu-1000"); // and what was left is swept
      await ledger.expectAllRight();
      expect(await readdir(oldPath).catch(() => "gone")).toBe("gone"); // nothing is made at the old path
    },
  );
});

describe("a store that moves under a restore", () => {
  it("leaves the disk that is on offer as it was, and offers the next one", TIMEOUT, async () => {
    await using node = await TestNode.create();
    const disks = [DISK, "drive-scsi1"].map((device) => ({ device, sizeBytes: 16 * MIB }));
    await using guest = await startGuest(node, { disks });
    const ledger = new VmLedger(node, guest);
    await ledger.backUp();
    await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
    await ledger.backUp();
    const [volname = "", oracles = new Map()] = [...ledger.points].at(-1) ?? [];
    await using provider = node.provider();
    await provider.restore.restoreVmInit(volname, never);
    const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(volname, DISK, never);
    await node.moveStore(`${node.storePath}.moved`);
    expect(await compareRaw(qemuImgPath, oracles.get(DISK) ?? "none")).toMatchObject({ identical: true });
    const next = await provider.restore.restoreVmVolumeInit(volname, "drive-scsi1", never);
    expect(await compareRaw(next.qemuImgPath, oracles.get("drive-scsi1") ?? "none")).toMatchObject({ identical: true });
    await provider.restore.restoreVmVolumeCleanup(volname, DISK);
    await provider.restore.restoreVmCleanup(volname);
    expect(await readdir(path.join(node.root, "run/pve-backup-host"))).toEqual([]);
    const mode = await ledger.backUp();
    expect(mode).toBe(`incremental since ${volname}`);
    await ledger.expectAllRight();
  });
});
