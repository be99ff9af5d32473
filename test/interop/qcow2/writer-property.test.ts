// SPDX-License-Identifier: AGPL-3.0-or-later
// Whatever is written, QEMU finds no error, no leak, and the bytes of a raw oracle.
import { copyFileSync, rmSync, statSync } from "node:fs";
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type ClusterCompressor, createCompressor } from "../../../src/qcow2/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { checkQcow2, openChain } from "../../support/qcow2/open-images.ts";
import {
  patchFile,
  qemuCheck,
  qemuCompare,
  qemuImg,
  scratchDir,
  shellDigest,
  writeRaw,
} from "../../support/qcow2/qcow2-images.ts";
import { type DiskPlan, diskPlan, layOut, type PlannedPiece, writePlan } from "../../support/qcow2/qcow2-plan.ts";

const SEED = 20_240_601;
const { signal } = new AbortController();
const compressors = new Map<string, ClusterCompressor>();

beforeAll(async () => {
  for (const kind of ["zlib", "zstd"] as const) compressors.set(kind, await createCompressor(kind));
});
afterAll(async () => {
  for (const compressor of compressors.values()) await compressor[Symbol.asyncDispose]();
});

async function judge(path: string, raw: string, plan: DiskPlan): Promise<void> {
  expect(qemuCheck(path)).toEqual({ status: 0, corruptions: 0, leaks: 0 });
  qemuCompare(raw, path);
  expect(await checkQcow2(path, { signal })).toMatchObject({ errors: [], errorCount: 0, leakedClusters: 0 });
  expect(statSync(path).size % 2 ** plan.clusterBits).toBe(0);
}

function overwrite(raw: string, pieces: readonly PlannedPiece[]): void {
  for (const { kind, offset, length, bytes } of pieces) {
    for (let at = 0; at < length; at += 2 ** 22) {
      const part = Math.min(2 ** 22, length - at);
      patchFile(raw, offset + at, kind === "data" ? bytes.subarray(at, at + part) : Buffer.alloc(part));
    }
  }
}

describe("Qcow2Writer", () => {
  it("writes whole disks that QEMU finds sound and equal", { timeout: 120_000 }, async (context) => {
    requireTool(context, "qemu-img", "xxhsum");
    using dir = scratchDir();
    const [path, raw] = [dir.file("a.qcow2"), dir.file("a.raw")];
    await fc.assert(
      fc.asyncProperty(diskPlan, async (plan) => {
        rmSync(path, { force: true });
        const pieces = layOut(plan);
        writeRaw(
          raw,
          plan.virtualBytes,
          pieces.filter((piece) => piece.kind === "data"),
        );
        const summary = await writePlan(path, plan, pieces, { compressor: compressors.get(plan.compression) });
        await judge(path, raw, plan);
        expect(summary.zeroClusters).toBe(0);
        expect(summary.fileBytes).toBe(statSync(path).size);
        expect(summary.digest).toEqual({ algorithm: "xxh3-128", value: shellDigest(path) });
      }),
      { seed: SEED, numRuns: 60, endOnFailure: true },
    );
  });

  it("writes images over a base: their zeroes hide it, the rest shows it", { timeout: 120_000 }, async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    const [base, top, raw] = [dir.file("base.qcow2"), dir.file("top.qcow2"), dir.file("a.raw")];
    const small = fc.constantFrom(64 * 1024 + 512, 3.5 * 2 ** 20, 17 * 2 ** 20 + 1536);
    await fc.assert(
      fc.asyncProperty(diskPlan, diskPlan, small, fc.nat(40), async (below, above, virtualBytes, seed) => {
        for (const file of [base, top]) rmSync(file, { force: true });
        const basePlan: DiskPlan = { ...below, virtualBytes };
        const topPlan: DiskPlan = { ...above, virtualBytes };
        const basePieces = layOut(basePlan);
        writeRaw(
          raw,
          virtualBytes,
          basePieces.filter((piece) => piece.kind === "data"),
        );
        // Half of the bases are QEMU's own.
        if (seed % 2 === 0) qemuImg("convert", "-f", "raw", "-O", "qcow2", raw, base);
        else await writePlan(base, basePlan, basePieces, { compressor: compressors.get(basePlan.compression) });
        const pieces = layOut(topPlan);
        overwrite(raw, pieces);
        const backing = { file: "base.qcow2", format: "qcow2" } as const;
        await writePlan(top, topPlan, pieces, { backing, compressor: compressors.get(topPlan.compression) });
        await judge(top, raw, topPlan);

        await using chain = await openChain([top, base], signal);
        const all = Buffer.alloc(virtualBytes, 0xcc);
        await chain.read(0, all, signal);
        copyFileSync(raw, dir.file("read.raw"));
        patchFile(dir.file("read.raw"), 0, all);
        qemuImg("compare", "-f", "raw", "-F", "raw", raw, dir.file("read.raw"));
      }),
      { seed: SEED, numRuns: 40, endOnFailure: true },
    );
  });

  it("writes a 16 TiB disk in a few clusters", { timeout: 180_000 }, async (context) => {
    requireTool(context, "qemu-img", "qemu-io");
    using dir = scratchDir();
    const path = dir.file("big.qcow2");
    const plan: DiskPlan = { virtualBytes: 2 ** 44, clusterBits: 16, compression: "none", steps: [] };
    const bytes = Buffer.alloc(65536, 0x5a);
    const at = (offset: number): PlannedPiece => ({ kind: "data", offset, length: 65536, bytes });
    const summary = await writePlan(path, plan, [at(0), at(2 ** 43), at(2 ** 44 - 65536)]);
    expect(summary.dataClusters).toBe(3);
    expect(qemuCheck(path)).toEqual({ status: 0, corruptions: 0, leaks: 0 });
    const map = JSON.parse(qemuImg("map", "--output=json", path)) as Array<{ start: number; data: boolean }>;
    expect(map.filter((extent) => extent.data).map((extent) => extent.start)).toEqual([0, 2 ** 43, 2 ** 44 - 65536]);
    await using chain = await openChain([path], signal);
    const target = Buffer.alloc(65536);
    await chain.read(2 ** 44 - 65536, target, signal);
    expect(target.equals(bytes)).toBe(true);
  });

  it("names the backing file and its format as given", async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    const path = dir.file("top.qcow2");
    const plan: DiskPlan = { virtualBytes: 2 ** 20, clusterBits: 16, compression: "zstd", steps: [] };
    await writePlan(path, plan, [], { backing: { file: "../qemu-1700000000/drive-scsi0.qcow2", format: "qcow2" } });
    const info = JSON.parse(qemuImg("info", "--output=json", path)) as Record<string, unknown>;
    expect(info["backing-filename"]).toBe("../qemu-1700000000/drive-scsi0.qcow2");
    expect(info["backing-filename-format"]).toBe("qcow2");
    expect(info["format-specific"]).toMatchObject({ data: { compat: "1.1", "compression-type": "zstd" } });
  });
});
