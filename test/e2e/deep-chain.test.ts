// SPDX-License-Identifier: AGPL-3.0-or-later
// An image deep in the chain that lost its tables: what builds on it is lost, too, and must not grow. And what the
// question costs where nothing changed.
import { readlinkSync } from "node:fs";
import { type FileHandle, open, readFile } from "node:fs/promises";
import path from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { backUp } from "../support/vm/vm-job.ts";
import { DISK, expectRestores, MIB, modeOf, mustBackUp, type SafeBackup, startGuest } from "../support/vm/vm-rules.ts";

const KIB = 1024;
const CLUSTER_BYTES = 64 * KIB;
/** Bits 9 to 55 of a table's entry. Source: QEMU docs/interop/qcow2, "L1 table entry". */
const OFFSET_BITS = 0x00ff_ffff_ffff_fe00n;

const at = (epoch: number): string => `backup/100/qemu-${epoch}`;
const imageOf = (node: TestNode, epoch: number): string => path.join(node.storePath, `100/qemu-${epoch}/${DISK}.qcow2`);

/** Three points, the last two incremental; the images below the newest are not what a job looks at first. */
async function threePoints(node: TestNode, guest: LabGuest): Promise<void> {
  await mustBackUp(node, guest, { epoch: 1000 });
  for (const epoch of [2000, 3000]) {
    await guest.write(DISK, (epoch / 250) * MIB, seededBytes(epoch, MIB));
    const { job } = await mustBackUp(node, guest, { epoch });
    expect(modeOf(job)).toBe(`incremental since ${at(epoch - 1000)}`);
  }
}

async function zero(image: string, offset: number, length: number): Promise<void> {
  await using handle = await open(image, "r+");
  await handle.write(Buffer.alloc(length), 0, length, offset);
}

/** Source: QEMU docs/interop/qcow2, "Header": l1_table_offset. */
const l1OffsetOf = (bytes: Buffer): number => Number(bytes.readBigUInt64BE(40));

async function loseL1(image: string): Promise<void> {
  await zero(image, l1OffsetOf(await readFile(image)), 8);
}

async function loseL2(image: string): Promise<void> {
  const bytes = await readFile(image);
  const l2Offset = Number(bytes.readBigUInt64BE(l1OffsetOf(bytes)) & OFFSET_BITS);
  await zero(image, l2Offset, CLUSTER_BYTES);
}

describe("an image deep in the chain", () => {
  const damages: ReadonlyArray<readonly [string, number, (image: string) => Promise<void>]> = [
    ["whose L1 table is lost", 1000, loseL1],
    ["whose L2 table is lost", 1000, loseL2],
    ["in its middle whose L2 table is lost", 2000, loseL2],
  ];

  it.each(damages)("%s makes the next backup full and right", async (_what, epoch, lose) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await threePoints(node, guest);
    await lose(imageOf(node, epoch));
    await guest.write(DISK, 20 * MIB, seededBytes("fourth", MIB));
    const fourth = await mustBackUp(node, guest, { epoch: 4000 });
    expect(fourth.job.modes).toEqual(new Map([[DISK, "new"]]));
    expect(modeOf(fourth.job)).toMatch(new RegExp(`^full: .*qemu-${epoch}/${DISK}\\.qcow2`));
    await expectRestores(node, fourth);
    const fifth = await mustBackUp(node, guest, { epoch: 5000 });
    expect(modeOf(fifth.job)).toBe(`incremental since ${at(4000)}`);
    await expectRestores(node, fifth);
  });

  it.each(damages)("%s between question and copy fails the job; the next one is full", async (_what, epoch, lose) => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await threePoints(node, guest);
    await guest.write(DISK, 20 * MIB, seededBytes("fourth", MIB));
    const failed = await backUp(node, guest, { epoch: 4000, afterQuery: () => lose(imageOf(node, epoch)) });
    expect(failed.modes).toEqual(new Map([[DISK, "use"]]));
    expect(String(failed.error)).toMatch(new RegExp(`^\\w+: Cannot [^\\n]*qemu-${epoch}/${DISK}\\.qcow2[^\\n]*$`));
    const fifth = await mustBackUp(node, guest, { epoch: 5000 });
    expect(fifth.job.modes).toEqual(new Map([[DISK, "new"]]));
    await expectRestores(node, fifth);
  });
});

/** Counts what is read of files behind their first cluster, by path, from now on. */
async function countReads(): Promise<ReadonlyMap<string, number>> {
  const counts = new Map<string, number>();
  await using some = await open("/dev/null");
  const prototype = Object.getPrototypeOf(some) as FileHandle;
  const read = prototype.read as (...args: unknown[]) => Promise<{ bytesRead: number }>;
  vi.spyOn(prototype, "read").mockImplementation(async function (this: FileHandle, ...args: unknown[]) {
    const file = readlinkSync(`/proc/self/fd/${this.fd}`);
    const done = await read.apply(this, args);
    const position = args.length > 1 ? args[3] : (args[0] as { position?: unknown } | undefined)?.position;
    if (Number(position ?? 0) >= CLUSTER_BYTES) counts.set(file, (counts.get(file) ?? 0) + done.bytesRead);
    return done as never;
  });
  return counts;
}

describe("a long chain that nobody touched", () => {
  afterEach(() => vi.restoreAllMocks());

  it("is not read from end to end again at every backup", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const epochs = Array.from({ length: 12 }, (_, index) => 1000 + index);
    let last: SafeBackup | undefined;
    for (const epoch of epochs) {
      await guest.write(DISK, (epoch % 6) * 4 * MIB, seededBytes(epoch, 64 * KIB));
      last = await mustBackUp(node, guest, { epoch });
    }
    expect(modeOf(last?.job ?? { log: [] })).toBe(`incremental since ${at(1010)}`);

    // Nothing changes in the guest: what is read of the old images is read to judge them.
    const counts = await countReads();
    const next = await mustBackUp(node, guest, { epoch: 2000 });
    expect(modeOf(next.job)).toBe(`incremental since ${at(1011)}`);
    const readOf = (epoch: number): number => counts.get(imageOf(node, epoch)) ?? 0;
    expect(readOf(1011)).toBeGreaterThan(0); // the counter counts
    const deep = epochs.slice(0, -2).map(readOf);
    expect(Math.max(...deep), deep.join(" ")).toBeLessThan(CLUSTER_BYTES);
    vi.restoreAllMocks();
    await expectRestores(node, next);
  });
});
