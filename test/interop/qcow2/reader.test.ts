// SPDX-License-Identifier: AGPL-3.0-or-later
// Images that QEMU wrote, in all its manners, read as QEMU reads them.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { requireTool } from "../../support/programs/tools.ts";
import { checkQcow2, openChain, readQcow2Header } from "../../support/qcow2/open-images.ts";
import {
  KIB,
  MIB,
  qemuCheck,
  qemuImg,
  randomBytes,
  scratchDir,
  textBytes,
  writeRaw,
} from "../../support/qcow2/qcow2-images.ts";

const { signal } = new AbortController();
const SIZE = 9 * MIB + 1536;

/** Data, text and holes; ends within a cluster, with data in its last sector. */
function makeRaw(path: string): void {
  writeRaw(path, SIZE, [
    { offset: 0, bytes: textBytes(MIB, 1) },
    { offset: 2 * MIB + 512, bytes: randomBytes(MIB + 512, 2) },
    { offset: 5 * MIB, bytes: textBytes(300 * KIB, 3) },
    { offset: 5 * MIB + 300 * KIB, bytes: randomBytes(100 * KIB, 4) },
    { offset: SIZE - 700, bytes: randomBytes(700, 5) },
  ]);
}

async function readAll(paths: readonly string[], chunk: number): Promise<Buffer> {
  await using chain = await openChain(paths, signal);
  const all = Buffer.alloc(chain.virtualBytes, 0xcc);
  for (let at = 0; at < all.length; at += chunk) await chain.read(at, all.subarray(at, at + chunk), signal);
  return all;
}

describe("Qcow2Chain", () => {
  it.for([
    ["plain", []],
    ["512 byte clusters", ["-o", "cluster_size=512"]],
    ["2 MiB clusters", ["-o", "cluster_size=2M"]],
    ["zlib", ["-c"]],
    ["zlib, 512 byte clusters", ["-c", "-o", "cluster_size=512"]],
    ["zlib, 2 MiB clusters", ["-c", "-o", "cluster_size=2M"]],
    ["zstd", ["-c", "-o", "compression_type=zstd"]],
    ["zstd, 4 KiB clusters", ["-c", "-o", "compression_type=zstd,cluster_size=4k"]],
    ["zlib, written out of order", ["-c", "-W", "-m", "8"]],
    ["version 2", ["-o", "compat=0.10"]],
    ["version 2, zlib", ["-c", "-o", "compat=0.10"]],
    ["lazy refcounts", ["-o", "lazy_refcounts=on"]],
    ["1 bit refcounts", ["-o", "refcount_bits=1"]],
    ["64 bit refcounts", ["-o", "refcount_bits=64"]],
    ["preallocated metadata", ["-o", "preallocation=metadata"]],
    ["preallocated, falloc", ["-o", "preallocation=falloc"]],
    ["preallocated in full", ["-o", "preallocation=full"]],
  ] as Array<[string, string[]]>)("reads what qemu-img wrote: %s", async ([, options], context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    const [raw, image] = [dir.file("a.raw"), dir.file("a.qcow2")];
    makeRaw(raw);
    qemuImg("convert", "-f", "raw", "-O", "qcow2", ...options, raw, image);
    const wanted = readFileSync(raw);
    expect((await readAll([image], 333_333)).equals(wanted)).toBe(true);
    expect((await readAll([image], 2 ** 24)).equals(wanted)).toBe(true);
    const report = await checkQcow2(image, { signal });
    expect(report).toMatchObject({ errors: [], leakedClusters: qemuCheck(image).leaks });
  });

  it("reads a chain of three with zero clusters and a base that is smaller", async (context) => {
    requireTool(context, "qemu-img", "qemu-io");
    using dir = scratchDir();
    const [raw, base, middle, top] = ["a.raw", "base.qcow2", "middle.qcow2", "top.qcow2"].map((name) =>
      dir.file(name),
    ) as [string, string, string, string];
    makeRaw(raw);
    qemuImg("convert", "-f", "raw", "-O", "qcow2", "-c", raw, base);
    qemuImg("create", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, "12M");
    execFileSync("qemu-io", [
      "-c",
      "write -P 7 600k 70k",
      "-c",
      "write -z 2M 300k",
      "-c",
      "write -P 9 11M 64k",
      middle,
    ]);
    qemuImg("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", "-o", "cluster_size=4k", top, "14M");
    execFileSync("qemu-io", ["-c", "write -z 620k 8k", "-c", "write -P 3 12M 5k", "-c", "write -z 0 4k", top]);
    qemuImg("convert", "-f", "qcow2", "-O", "raw", top, dir.file("wanted.raw"));
    const wanted = readFileSync(dir.file("wanted.raw"));
    expect((await readAll([top, middle, base], 123_456)).equals(wanted)).toBe(true);
  });

  it("fills with zeroes what lies beyond the end of the disk", async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    makeRaw(dir.file("a.raw"));
    qemuImg("convert", "-f", "raw", "-O", "qcow2", dir.file("a.raw"), dir.file("a.qcow2"));
    await using chain = await openChain([dir.file("a.qcow2")], signal);
    const target = Buffer.alloc(4096, 0xcc);
    await chain.read(SIZE - 700, target, signal);
    expect(target.subarray(0, 700).equals(randomBytes(700, 5))).toBe(true);
    expect(target.subarray(700).equals(Buffer.alloc(3396))).toBe(true);
  });

  it("ends with the abort reason", async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    qemuImg("create", "-f", "qcow2", dir.file("a.qcow2"), "1M");
    await using chain = await openChain([dir.file("a.qcow2")], signal);
    const reason = new Error("enough");
    await expect(chain.read(0, Buffer.alloc(512), AbortSignal.abort(reason))).rejects.toBe(reason);
  });
});

describe("readQcow2Header()", () => {
  it.for([
    ["extended L2 entries", ["-o", "extended_l2=on"], /extended L2/],
    ["an external data file", ["-o", "data_file=data.raw"], /another file/],
    // Not LUKS: on a busy machine QEMU cannot always measure how fast it derives a key, and gives up.
    ["encryption", ["--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"], /encrypted/],
  ] as Array<[string, string[], RegExp]>)(
    "refuses an image of QEMU with %s",
    { timeout: 180_000 },
    async ([, options, message], context) => {
      requireTool(context, "qemu-img");
      using dir = scratchDir();
      execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", ...options, "a.qcow2", "1M"], { cwd: dir.path });
      await expect(readQcow2Header(dir.file("a.qcow2"))).rejects.toThrow(message);
    },
  );
});
