// SPDX-License-Identifier: AGPL-3.0-or-later
// PVE's bitmap has granules of 4 MiB. Of a dirty granule an increment holds the clusters that differ from the base, and no
// others; where the digests of the base tell nothing, it holds all of them.
import { copyFile, readFile, rm, stat, truncate, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { type LabGuest, runTool, SeededRandom, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { DISK, DISK_BYTES, expectRestores, MIB, modeOf, mustBackUp, startGuest } from "../support/vm/vm-rules.ts";

const CLUSTER = 64 * 1024;
const NOT_COMPARED =
  /^warn: Cannot (?:use|read) ".*drive-scsi0\.digests": .*; what it records is compared with nothing$/;

interface MapEntry {
  readonly start: number;
  readonly length: number;
  readonly depth: number;
  readonly zero: boolean;
}

const fileOf = (node: TestNode, epoch: number, name: string): string =>
  path.join(node.storePath, `100/qemu-${epoch}`, name);

/** Clusters that the point's own image holds, as qemu-img sees it. */
async function ownClusters(node: TestNode, epoch: number): Promise<number[]> {
  const image = fileOf(node, epoch, `${DISK}.qcow2`);
  const map = JSON.parse(await runTool("qemu-img", ["map", "--output=json", image])) as MapEntry[];
  return map
    .filter(({ depth }) => depth === 0)
    .flatMap(({ start, length }) => Array.from({ length: Math.ceil(length / CLUSTER) }, (_, n) => start / CLUSTER + n));
}

/** Clusters in which two raw files differ. */
async function differingClusters(a: string, b: string): Promise<number[]> {
  const [before, after] = [await readFile(a), await readFile(b)];
  const all = Array.from({ length: DISK_BYTES / CLUSTER }, (_, n) => n);
  return all.filter((n) => before.compare(after, n * CLUSTER, (n + 1) * CLUSTER, n * CLUSTER, (n + 1) * CLUSTER) !== 0);
}

describe("an increment holds exactly the clusters that differ", () => {
  it.each(["none", "zstd"])(
    "whatever the guest wrote over several backups (dir-compression %s)",
    async (compression) => {
      await using node = await TestNode.create({ "dir-compression": compression });
      await using guest = await startGuest(node);
      const random = new SeededRandom(77);
      const points = [await mustBackUp(node, guest, { epoch: 1000 })];
      for (let epoch = 2000; epoch <= 5000; epoch += 1000) {
        for (let turn = 0; turn < 6; turn++) await writeSomething(guest, random);
        points.push(await mustBackUp(node, guest, { epoch }));
        const [before, after] = points.slice(-2).map(({ oracles }) => oracles.get(DISK) ?? "no oracle");
        expect(modeOf(points.at(-1)?.job ?? { log: [] })).toBe(`incremental since backup/100/qemu-${epoch - 1000}`);
        expect(await ownClusters(node, epoch)).toEqual(await differingClusters(before ?? "", after ?? ""));
      }
      await expectRestores(node, ...points);
    },
  );

  it("so that 4 KiB cost one cluster, and the log says what was unchanged", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 2 * MIB + 4096, seededBytes("small", 4096));
    const { job } = await mustBackUp(node, guest, { epoch: 2000 });
    expect(await ownClusters(node, 2000)).toEqual([(2 * MIB) / CLUSTER]);
    expect(job.log).toContainEqual(
      expect.stringMatching(
        /^info: drive-scsi0: 100% of 4\.0 MiB dirty .* read: 4\.0 MiB, zero: 0 B, unchanged: 3\.9 MiB, written: /,
      ),
    );
    expect((await stat(fileOf(node, 2000, `${DISK}.qcow2`))).size).toBeLessThan(MIB);
  });
});

/** A small write, the same bytes again, zeroes over data, zeroes over zeroes, a discard. */
async function writeSomething(guest: LabGuest, random: SeededRandom): Promise<void> {
  const offset = random.integer(0, DISK_BYTES / 4096 - 64) * 4096;
  const length = random.integer(1, 40) * 4096;
  const acts = [
    () => guest.write(DISK, offset, seededBytes(random.integer(0, 9), length)),
    () => guest.write(DISK, 0, seededBytes("start", 5 * MIB)),
    () => guest.write(DISK, offset, Buffer.alloc(length)),
    () => guest.writeZeroes(DISK, offset, length),
    () => guest.discard(DISK, offset, length),
  ];
  await acts[random.integer(0, acts.length - 1)]?.();
}

describe("the digests of a backup", () => {
  it("are those that docs/store-format.md computes by hand", async (context) => {
    requireTool(context, "python3", "bash");
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await guest.write(DISK, 2 * MIB, seededBytes("by hand", 4096));
    await mustBackUp(node, guest, { epoch: 1000 });
    const page = await readFile(path.resolve(import.meta.dirname, "../../docs/store-format.md"), "utf8");
    const script = /```bash\n(cluster=32\n.*?)```/s.exec(page)?.[1] ?? "false";
    const cwd = path.join(node.storePath, "100/qemu-1000");
    const printed = (
      await runTool("bash", [
        "-ec",
        `cd "$0" && { ${script}
}`,
        cwd,
      ])
    )
      .trim()
      .split("\n");
    const [computed, recorded] = printed.map((line) => line.split(" "));
    expect([computed?.[0], recorded?.[0], printed.length]).toEqual(["computed", "recorded", 2]);
    expect(recorded?.[1]).toMatch(/^[0-9a-f]{32}$/);
    expect(recorded?.[1]).toBe(computed?.[1]);
  });
});

describe("digests of the base that tell nothing", () => {
  type Spoil = (node: TestNode) => Promise<unknown>;
  const own = (node: TestNode): string => fileOf(node, 1000, `${DISK}.digests`);
  const spoils: Array<[string, Spoil, RegExp | undefined]> = [
    ["are missing", (node) => rm(own(node)), /no such file or directory/],
    ["were cut", (node) => truncate(own(node), 4096), /it has 4096 bytes, expected 8192/],
    ["have a flipped bit", (node) => flip(own(node), 4200), /checksum mismatch in page 1/],
    ["have a flipped bit in their head", (node) => flip(own(node), 60), /checksum mismatch in page 0/],
    [
      "are another backup's",
      (node) => copyFile(fileOf(node, 900, `${DISK}.digests`), own(node)),
      /belongs to another backup/,
    ],
    ["were never made", forget, undefined],
  ];

  it.each(spoils)("that %s are not trusted: all of the granule is stored", async (_why, spoil, said) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 900 });
    await rm(path.join(node.root, "etc/pve/priv/pve-backup-host"), { recursive: true });
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await spoil(node);
    await guest.write(DISK, 2 * MIB + 4096, seededBytes("small", 4096));
    const second = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(second.job)).toBe("incremental since backup/100/qemu-1000");
    expect(await ownClusters(node, 2000)).toEqual(Array.from({ length: 64 }, (_, n) => n));
    const warnings = second.job.log.filter((line) => line.startsWith("warn"));
    expect(warnings).toEqual(said === undefined ? [] : [expect.stringMatching(NOT_COMPARED)]);
    if (said !== undefined) expect(warnings[0]).toMatch(said);
    await expectRestores(node, first, second);
  });

  async function flip(file: string, at: number): Promise<void> {
    const bytes = await readFile(file);
    bytes.writeUInt8(bytes.readUInt8(at) ^ 4, at);
    await writeFile(file, bytes);
  }

  /** As a backup of an earlier version: the file is not there, and the manifest knows nothing of it. */
  async function forget(node: TestNode): Promise<void> {
    await rm(own(node));
    const file = fileOf(node, 1000, "manifest.json");
    const manifest = JSON.parse(await readFile(file, "utf8")) as { files: { name: string }[] };
    const files = manifest.files.filter(({ name }) => !name.endsWith(".digests"));
    await writeFile(file, JSON.stringify({ ...manifest, files }));
  }
});
