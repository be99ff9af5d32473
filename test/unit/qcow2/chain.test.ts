// SPDX-License-Identifier: AGPL-3.0-or-later
// Images made to hurt their reader: each gets one sentence, within bounded time and memory.
import { execFileSync } from "node:child_process";
import { linkSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { deflateRawSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { requireTool } from "../../support/programs/tools.ts";
import { openChain, readQcow2Header } from "../../support/qcow2/open-images.ts";
import { MIB, openFiles, patchFile, scratchDir, textBytes } from "../../support/qcow2/qcow2-images.ts";
import { writePlan } from "../../support/qcow2/qcow2-plan.ts";

const { signal } = new AbortController();
const CLUSTER = 65536;

async function image(
  path: string,
  compression: "none" | "zlib" | "zstd",
  backing?: string,
): Promise<{ l1: number; l2: number }> {
  const bytes = textBytes(CLUSTER, 1);
  await writePlan(
    path,
    { virtualBytes: MIB, clusterBits: 16, compression, steps: [] },
    [{ kind: "data", offset: 0, length: CLUSTER, bytes }],
    backing === undefined ? {} : { backing: { file: backing, format: "qcow2" } },
  );
  const file = readFileSync(path);
  const l1 = Number(file.readBigUInt64BE(40));
  return { l1, l2: Number(file.readBigUInt64BE(l1) & 0x00fffffffffffe00n) };
}

function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(value);
  return bytes;
}

async function readFirst(...paths: string[]): Promise<Buffer> {
  await using chain = await openChain(paths, signal);
  const target = Buffer.alloc(CLUSTER);
  await chain.read(0, target, signal);
  return target;
}

describe("readQcow2Header()", () => {
  it("refuses an empty file and one that ends within the header", async () => {
    using dir = scratchDir();
    writeFileSync(dir.file("empty"), "");
    await expect(readQcow2Header(dir.file("empty"))).rejects.toThrow(/only 0 bytes/);
    await image(dir.file("a"), "none");
    truncateSync(dir.file("a"), 80);
    await expect(readQcow2Header(dir.file("a"))).rejects.toThrow(/ends within its header, at byte 80/);
  });
});

describe("openChain()", () => {
  it("refuses an L1 table that the file does not hold", async () => {
    using dir = scratchDir();
    await image(dir.file("a"), "none");
    patchFile(dir.file("a"), 24, u64(2n ** 51n)); // virtual size: 2 PiB
    patchFile(dir.file("a"), 36, "00400000"); // 32 MiB of L1 entries, the most there is
    await expect(openChain([dir.file("a")], signal)).rejects.toThrow(/it ends at byte/);
  });

  it("refuses one image twice, also by another name", async () => {
    using dir = scratchDir();
    await image(dir.file("a"), "none", "a");
    linkSync(dir.file("a"), dir.file("b"));
    await expect(openChain([dir.file("a"), dir.file("a")], signal)).rejects.toThrow(/comes twice/);
    await expect(openChain([dir.file("a"), dir.file("b")], signal)).rejects.toThrow(/comes twice/);
  });

  it("refuses chains that are shorter or longer than the headers say", async () => {
    using dir = scratchDir();
    await image(dir.file("top"), "none", "base");
    await image(dir.file("base"), "none");
    await expect(openChain([dir.file("top")], signal)).rejects.toThrow(/is its last image but has a backing file/);
    await expect(openChain([dir.file("base"), dir.file("top")], signal)).rejects.toThrow(/no backing file/);
    await expect(openChain([], signal)).rejects.toThrow(/chain of 0 images/);
    patchFile(dir.file("top"), 120, Buffer.from("raw\0\0")); // the backing format
    patchFile(dir.file("top"), 116, "00000003");
    await expect(openChain([dir.file("top"), dir.file("base")], signal)).rejects.toThrow(/of format "raw"/);
  });

  it("never opens the file that a header names", async () => {
    using dir = scratchDir();
    await image(dir.file("top"), "none", "/dev/does/not/exist");
    await image(dir.file("base"), "none");
    expect((await readFirst(dir.file("top"), dir.file("base"))).equals(textBytes(CLUSTER, 1))).toBe(true);
  });

  it("leaves no file open when it fails", async () => {
    using dir = scratchDir();
    await image(dir.file("top"), "none", "base");
    writeFileSync(dir.file("base"), "no image");
    await expect(openChain([dir.file("top"), dir.file("base")], signal)).rejects.toThrow(/only 8 bytes/);
    expect(openFiles(dir.path)).toEqual([]);
  });
});

describe("Qcow2Chain.read()", () => {
  it.each([
    ["an L2 table behind the end of the file", 1n << 40n, /it ends at byte/],
    ["an L2 table that is not aligned", 0x10200n, /not cluster-aligned/],
    ["reserved bits in the L1 table", 1n, /reserved bits/],
  ])("refuses %s", async (_, entry, message) => {
    using dir = scratchDir();
    const { l1 } = await image(dir.file("a"), "none");
    patchFile(dir.file("a"), l1, u64(entry));
    await expect(readFirst(dir.file("a"))).rejects.toThrow(message);
  });

  it.each([
    ["data behind the end of the file", 1n << 40n, /it ends at byte/],
    ["a compressed cluster behind the end of the file", (1n << 62n) | (1n << 40n), /Cannot decompress/],
  ])("refuses %s", async (_, entry, message) => {
    using dir = scratchDir();
    const { l2 } = await image(dir.file("a"), "none");
    patchFile(dir.file("a"), l2, u64(entry));
    await expect(readFirst(dir.file("a"))).rejects.toThrow(message);
  });

  it.each(["zlib", "zstd"] as const)("refuses a damaged %s stream", async (kind) => {
    using dir = scratchDir();
    await image(dir.file("a"), kind);
    patchFile(dir.file("a"), CLUSTER, Buffer.alloc(64, 0xff));
    await expect(readFirst(dir.file("a"))).rejects.toThrow(/Cannot read ".*a" at byte 65536: Cannot decompress a z/);
  });

  it("refuses a zlib stream of 1 GiB or of half a cluster", async () => {
    using dir = scratchDir();
    const { l2 } = await image(dir.file("a"), "none");
    // 127 additional sectors: everything from 65536 to the end of that cluster.
    patchFile(dir.file("a"), l2, u64((1n << 62n) | (127n << 54n) | 65536n));
    patchFile(dir.file("a"), CLUSTER, deflateRawSync(Buffer.alloc(40 * MIB), { windowBits: 12 }).subarray(0, CLUSTER));
    await expect(readFirst(dir.file("a"))).rejects.toThrow(/Cannot decompress a zlib cluster/);
    patchFile(dir.file("a"), CLUSTER, deflateRawSync(Buffer.alloc(CLUSTER / 2), { windowBits: 12 }));
    await expect(readFirst(dir.file("a"))).rejects.toThrow(/it has 32768 bytes, expected 65536/);
  });

  it("refuses a zstd stream of 1 GiB or of half a cluster", async (context) => {
    requireTool(context, "zstd");
    using dir = scratchDir();
    await image(dir.file("a"), "zstd");
    const zstd = (bytes: number) => execFileSync("zstd", ["-c"], { input: Buffer.alloc(bytes) });
    patchFile(dir.file("a"), CLUSTER, zstd(64 * MIB));
    await expect(readFirst(dir.file("a"))).rejects.toThrow(/Cannot decompress a zstd cluster/);
    patchFile(dir.file("a"), CLUSTER, zstd(CLUSTER / 2));
    await expect(readFirst(dir.file("a"))).rejects.toThrow(/Cannot decompress a zstd cluster/);
  });
});
