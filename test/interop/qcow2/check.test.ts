// SPDX-License-Identifier: AGPL-3.0-or-later
// Damage made on purpose, found by checkQcow2() and by `qemu-img check` alike.
import { readFileSync, truncateSync } from "node:fs";
import { beforeAll, describe, expect, it } from "vitest";
import type { CheckReport } from "../../../src/qcow2/check-report.ts";
import { hasTool, requireTool } from "../../support/programs/tools.ts";
import { checkQcow2 } from "../../support/qcow2/open-images.ts";
import {
  MIB,
  patchFile,
  qemuCheck,
  qemuImg,
  randomBytes,
  scratchDir,
  textBytes,
} from "../../support/qcow2/qcow2-images.ts";
import { type PlannedPiece, writePlan } from "../../support/qcow2/qcow2-plan.ts";

const { signal } = new AbortController();
const COPIED = 1n << 63n;

/** Where things are, read from the file by hand. */
interface Places {
  readonly bytes: Buffer;
  readonly l1: number;
  readonly l2: number;
  readonly refcountTable: number;
  readonly refcountBlock: number;
}

function locate(path: string): Places {
  const bytes = readFileSync(path);
  const offset = (at: number) => Number(bytes.readBigUInt64BE(at) & 0x00fffffffffffe00n);
  const l1 = offset(40);
  const refcountTable = offset(48);
  return { bytes, l1, l2: offset(l1), refcountTable, refcountBlock: offset(refcountTable) };
}

function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(value);
  return bytes;
}

const piece = (offset: number, bytes: Buffer): PlannedPiece => ({ kind: "data", offset, length: bytes.length, bytes });
const check = (path: string): Promise<CheckReport> => checkQcow2(path, { signal });

/** 2 MiB of plain clusters in a 4 MiB disk: guest cluster n is in host cluster n + 1. */
async function plainImage(path: string): Promise<Places> {
  await writePlan(path, { virtualBytes: 4 * MIB, clusterBits: 16, compression: "none", steps: [] }, [
    piece(0, randomBytes(2 * MIB, 1)),
  ]);
  return locate(path);
}

let isQemuHere = false;
beforeAll(() => {
  isQemuHere = hasTool("qemu-img");
});

/** Ours finds what QEMU finds: errors, leaks, or nothing. */
function agree(path: string, report: CheckReport): void {
  if (!isQemuHere) return;
  const judge = qemuCheck(path);
  expect({ errors: judge.corruptions > 0, leaks: judge.leaks }).toEqual({
    errors: report.errorCount > 0,
    leaks: report.leakedClusters,
  });
}

describe("checkQcow2()", () => {
  it("counts the clusters of a sound image", async () => {
    using dir = scratchDir();
    const path = dir.file("a");
    const pieces = [piece(0, textBytes(MIB, 1)), piece(MIB, randomBytes(MIB, 2))];
    const zero: PlannedPiece = { kind: "zero", offset: 2 * MIB, length: MIB, bytes: Buffer.alloc(0) };
    const plan = { virtualBytes: 4 * MIB, clusterBits: 16, compression: "zstd", steps: [] } as const;
    await writePlan(path, plan, [...pieces, zero], { backing: { file: "nowhere", format: "qcow2" } });
    const report = await check(path);
    expect(report).toEqual({
      errors: [],
      errorCount: 0,
      leakedClusters: 0,
      dataClusters: 16,
      compressedClusters: 16,
      zeroClusters: 16,
      fileBytes: readFileSync(path).length,
    });
  });

  it("finds a refcount that is too low", async () => {
    using dir = scratchDir();
    const { refcountBlock } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), refcountBlock + 2 * 5, "0000"); // host cluster 5
    const report = await check(dir.file("a"));
    expect(report.errors).toContain("host cluster 5 has refcount 0, but 1 references");
    expect(report.errors).toContain("cluster 4 of L2 table 0 has refcount 0, its copied flag says 1");
    agree(dir.file("a"), report);
  });

  it("finds leaked clusters: a refcount too high, and a reference that is gone", async () => {
    using dir = scratchDir();
    const { l2 } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), l2 + 8 * 3, u64(0n)); // guest cluster 3 forgotten
    const report = await check(dir.file("a"));
    expect(report).toMatchObject({ errors: [], leakedClusters: 1, dataClusters: 31 });
    agree(dir.file("a"), report);
  });

  it("finds two guest clusters in one host cluster", async () => {
    using dir = scratchDir();
    const { l2 } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), l2 + 8 * 3, u64(COPIED | 0x10000n)); // where guest cluster 0 is
    const report = await check(dir.file("a"));
    expect(report.errors[0]).toBe("cluster 3 of L2 table 0 lies in host cluster 1, which is in use already");
    expect(report.leakedClusters).toBe(1);
    agree(dir.file("a"), report);
  });

  it.each([
    ["the header", 0n],
    ["its own L2 table", -1n],
    ["the refcount block", -2n],
  ])("finds data in the place of %s", async (what, place) => {
    using dir = scratchDir();
    const places = await plainImage(dir.file("a"));
    const offset = place === -1n ? places.l2 : places.refcountBlock;
    // An offset of 0 means "unallocated": the header can only be hit by a compressed cluster.
    const entry = what === "the header" ? (1n << 62n) | 0x200n : COPIED | BigInt(offset);
    patchFile(dir.file("a"), places.l2 + 8 * 40, u64(entry));
    const report = await check(dir.file("a"));
    expect(report.errors.some((error) => error.includes("in use already"))).toBe(true);
    agree(dir.file("a"), report);
  });

  it("finds an L2 table that is referred to twice", async () => {
    using dir = scratchDir();
    const plan = { virtualBytes: 1024 * MIB, clusterBits: 16, compression: "none", steps: [] } as const;
    const second = [piece(0, randomBytes(MIB, 1)), piece(512 * MIB, randomBytes(MIB, 2))];
    await writePlan(dir.file("a"), plan, second);
    const { l1, bytes } = locate(dir.file("a"));
    patchFile(dir.file("a"), l1 + 8, bytes.subarray(l1, l1 + 8));
    const report = await check(dir.file("a"));
    expect(report.errors[0]).toMatch(/^L2 table 1 lies in host cluster \d+, which is in use already$/);
    if (isQemuHere) expect(qemuCheck(dir.file("a")).status).not.toBe(0);
  });

  it.each([
    ["a data cluster", COPIED | 0x7fff0000n],
    ["a compressed cluster", (1n << 62n) | 0x7fff0000n],
  ])("finds %s outside the file", async (_, entry) => {
    using dir = scratchDir();
    const { l2 } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), l2 + 8 * 40, u64(entry));
    const report = await check(dir.file("a"));
    expect(report.errors[0]).toMatch(/^cluster 40 of L2 table 0 at 2147418112 is outside the file of \d+ bytes$/);
    agree(dir.file("a"), report);
  });

  it("finds an L2 table and a refcount block outside the file", async () => {
    using dir = scratchDir();
    const { l1, refcountTable } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), l1, u64(COPIED | 0x7fff0000n));
    expect((await check(dir.file("a"))).errors[0]).toMatch(/^L2 table 0 at 2147418112 is outside the file/);
    patchFile(dir.file("a"), refcountTable, u64(0x7fff0000n));
    expect((await check(dir.file("a"))).errors[0]).toMatch(/^refcount block 0 at 2147418112 is outside the file/);
  });

  it("finds reserved bits and offsets that are not aligned, in every table", async () => {
    using dir = scratchDir();
    const { l1, l2, refcountTable } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), l2 + 8 * 40, u64(COPIED | 0x10200n));
    patchFile(dir.file("a"), l2 + 8 * 41, u64(COPIED | 0x10002n));
    expect((await check(dir.file("a"))).errors).toEqual([
      "cluster 40 of L2 table 0: Cannot use L2 entry 0x8000000000010200: its offset is not cluster-aligned",
      "cluster 41 of L2 table 0: Cannot use L2 entry 0x8000000000010002: reserved bits are set",
    ]);
    patchFile(dir.file("a"), l1, u64(COPIED | 1n));
    expect((await check(dir.file("a"))).errors[0]).toMatch(/^L1 entry 0: .*reserved bits are set$/);
    patchFile(dir.file("a"), refcountTable, u64(1n));
    expect((await check(dir.file("a"))).errors[0]).toMatch(/^refcount block 0: .*reserved bits are set$/);
  });

  it("finds a copied flag that is missing", async () => {
    using dir = scratchDir();
    const { l2 } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), l2, u64(0x10000n));
    const report = await check(dir.file("a"));
    expect(report.errors).toEqual(["cluster 0 of L2 table 0 has refcount 1, its copied flag says not 1"]);
    agree(dir.file("a"), report);
  });

  it("finds that the file was cut", async () => {
    using dir = scratchDir();
    await plainImage(dir.file("a"));
    const { length } = readFileSync(dir.file("a"));
    truncateSync(dir.file("a"), length - 65536); // the refcount table
    await expect(check(dir.file("a"))).rejects.toThrow(/it ends at byte \d+, expected 65536 bytes from byte \d+ on/);
  });

  it("reports a bounded number of errors, and counts the others", async () => {
    using dir = scratchDir();
    const { refcountBlock } = await plainImage(dir.file("a"));
    patchFile(dir.file("a"), refcountBlock, Buffer.alloc(65536));
    const report = await check(dir.file("a"));
    expect(report.errors.length).toBe(20);
    expect(report.errorCount).toBeGreaterThan(60);
  });

  it("finds the same in many small windows as in one", async () => {
    using dir = scratchDir();
    const path = dir.file("a");
    const plan = { virtualBytes: 8 * MIB, clusterBits: 9, compression: "zlib", steps: [] } as const;
    await writePlan(path, plan, [piece(0, textBytes(MIB, 1)), piece(4 * MIB, randomBytes(MIB, 2))]);
    const { l2, refcountBlock } = locate(path);
    patchFile(path, refcountBlock + 2 * 130, "0009");
    patchFile(path, l2 + 8 * 3, u64(0n));
    const whole = await check(path);
    expect(whole.leakedClusters).toBeGreaterThan(0);
    const progress: number[] = [];
    const windows = { signal, windowClusters: 333, onProgress: (part: number) => progress.push(part) };
    expect(await checkQcow2(path, windows)).toEqual(whole);
    expect(progress).toEqual([...progress].sort((a, b) => a - b));
    agree(path, whole);
  });

  it("does not check what it cannot count: internal snapshots", async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    qemuImg("create", "-f", "qcow2", dir.file("a"), "1M");
    qemuImg("snapshot", "-c", "one", dir.file("a"));
    await expect(check(dir.file("a"))).rejects.toThrow(/internal snapshots or bitmaps/);
  });

  it("ends with the abort reason", async () => {
    using dir = scratchDir();
    await plainImage(dir.file("a"));
    const reason = new Error("enough");
    await expect(checkQcow2(dir.file("a"), { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });
});
