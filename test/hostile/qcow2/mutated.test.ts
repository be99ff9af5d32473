// SPDX-License-Identifier: AGPL-3.0-or-later
// Sound images with a few bytes of their header and tables changed. The check and the reader must survive all
// of them, with bounded work and memory; and where the check finds an image sound, QEMU must agree, and read
// the same bytes.
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, beforeAll, describe, it, vi } from "vitest";
import type { RegularFile } from "../../../src/host/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { checkQcow2, openChain } from "../../support/qcow2/open-images.ts";
import { qemuCompare, qemuImg, randomBytes, scratchDir, textBytes } from "../../support/qcow2/qcow2-images.ts";
import { writePlan } from "../../support/qcow2/qcow2-plan.ts";
import { CASES, CASES_TIMEOUT_MS, expectHostError, must, Tally } from "../cases.ts";

/** Files that exist in memory alone: a hundred thousand of them on a disk would take too long. */
const memory = vi.hoisted(() => ({ files: new Map<string, Buffer>(), readBytes: 0, largestRead: 0 }));

vi.mock("../../../src/host/regular-file.ts", async (importOriginal) => {
  const real = await importOriginal<typeof import("../../../src/host/regular-file.ts")>();
  return {
    ...real,
    openRegularFile: async (path: string): Promise<RegularFile> => {
      const bytes = memory.files.get(path);
      if (bytes === undefined) return await real.openRegularFile(path);
      const handle = {
        stat: async () => ({ dev: 0n, ino: path, isFile: () => true, size: bytes.length }),
        read: async (target: Buffer, at: number, length: number, position: number) => {
          memory.largestRead = Math.max(memory.largestRead, length);
          const bytesRead = position >= bytes.length ? 0 : bytes.copy(target, at, position, position + length);
          memory.readBytes += bytesRead;
          return { bytesRead };
        },
      } as unknown as RegularFile["handle"];
      return { path, handle, fileBytes: bytes.length, links: 1, [Symbol.asyncDispose]: async () => undefined };
    },
  };
});

const { signal } = new AbortController();
const KIB = 1024;
const DISK_BYTES = 96 * KIB;
const COPIED = 1n << 63n;
const COMPRESSED = 1n << 62n;

interface Sound {
  readonly name: string;
  readonly bytes: Buffer;
  /** Where its header and tables are: what is worth changing. */
  readonly places: readonly number[];
  /** Offsets that mean something in it. */
  readonly offsets: readonly bigint[];
}

const dir = scratchDir();
const images: Sound[] = [];

/** Positions of every table entry and header field, found by hand. Source: QEMU docs/interop/qcow2. */
function describeImage(name: string, path: string): Sound {
  const bytes = readFileSync(path);
  const clusterBytes = 2 ** bytes.readUInt32BE(20);
  const mask = 0x00fffffffffffe00n;
  const places: number[] = [];
  const offsets = new Set<bigint>([0n, BigInt(bytes.length), BigInt(bytes.length + clusterBytes), 1n << 40n]);
  const add = (start: number, length: number, step: number): void => {
    offsets.add(BigInt(start));
    for (let at = start; at < start + length; at += step) places.push(at);
  };
  // The header twice: it is small, and all depends on it.
  for (let round = 0; round < 2; round++) add(0, 160, 4);
  const l1 = Number(bytes.readBigUInt64BE(40));
  const l1Entries = bytes.readUInt32BE(36);
  for (let round = 0; round < 4; round++) add(l1, l1Entries * 8, 8);
  for (let index = 0; index < l1Entries; index++) {
    const l2 = Number(bytes.readBigUInt64BE(l1 + index * 8) & mask);
    if (l2 === 0) continue;
    add(l2, clusterBytes, 8);
    for (let at = l2; at < l2 + clusterBytes; at += 8) {
      const entry = bytes.readBigUInt64BE(at);
      if ((entry & COMPRESSED) === 0n && (entry & mask) !== 0n) offsets.add(entry & mask);
    }
  }
  const table = Number(bytes.readBigUInt64BE(48));
  for (let round = 0; round < 4; round++) add(table, 16, 8);
  for (let at = table; at < table + clusterBytes; at += 8) {
    const block = Number(bytes.readBigUInt64BE(at));
    if (block !== 0) add(block, Math.min(clusterBytes, (bytes.length / clusterBytes) * 2), 2);
  }
  return { name, bytes, places, offsets: [...offsets] };
}

function fromQemu(raw: string, name: string, options: string, ...more: string[]): void {
  const path = dir.file(`${name}.qcow2`);
  qemuImg("convert", "-f", "raw", "-O", "qcow2", "-o", options, ...more, raw, path);
  images.push(describeImage(name, path));
}

beforeAll(async () => {
  const raw = dir.file("raw");
  const content = Buffer.alloc(DISK_BYTES);
  randomBytes(9 * KIB, 1).copy(content, 0);
  textBytes(12 * KIB, 2).copy(content, 20 * KIB);
  randomBytes(5 * KIB, 3).copy(content, 80 * KIB);
  writeFileSync(raw, content);
  fromQemu(raw, "plain", "cluster_size=512");
  fromQemu(raw, "wide", "cluster_size=4096,refcount_bits=64");
  fromQemu(raw, "old", "compat=0.10,cluster_size=512");
  fromQemu(raw, "narrow", "cluster_size=512,refcount_bits=1");
  fromQemu(raw, "zlib", "cluster_size=4096", "-c");
  fromQemu(raw, "zstd", "cluster_size=4096,compression_type=zstd", "-c");
  const pieces = [0, 20 * KIB, 80 * KIB].map((offset) => {
    const bytes = content.subarray(offset, offset + 4 * KIB);
    return { kind: "data" as const, offset, length: bytes.length, bytes };
  });
  const zero = { kind: "zero" as const, offset: 40 * KIB, length: 8 * KIB, bytes: Buffer.alloc(0) };
  const plan = { virtualBytes: DISK_BYTES, clusterBits: 9, steps: [] };
  const own = [pieces[0], pieces[1], zero, pieces[2]].filter((piece) => piece !== undefined);
  await writePlan(dir.file("own.qcow2"), { ...plan, compression: "none" }, own);
  await writePlan(dir.file("zeroed.qcow2"), { ...plan, compression: "zstd" }, own, {
    backing: { file: "base", format: "qcow2" },
  });
  images.push(describeImage("own", dir.file("own.qcow2")), describeImage("zeroed", dir.file("zeroed.qcow2")));
  memory.files.set("base", readFileSync(dir.file("plain.qcow2")));
}, 180_000);

afterAll(() => dir[Symbol.dispose]());

interface Edit {
  readonly kind: "flip" | "byte" | "u32" | "u64" | "pointer" | "swap";
  readonly place: number;
  readonly value: number;
}

const edits = fc.array(
  fc.record<Edit>({
    kind: fc.constantFrom("flip", "flip", "byte", "u32", "u64", "pointer", "pointer", "swap"),
    place: fc.nat(0xffff),
    value: fc.nat(0xffff),
  }),
  { minLength: 1, maxLength: 3 },
);

const U64 = [
  0n,
  1n,
  0x1ffn,
  0x200n,
  COPIED,
  COMPRESSED,
  COPIED | 1n,
  COMPRESSED | 0x300n,
  (1n << 63n) - 1n,
  (1n << 64n) - 1n,
];
const U32 = [
  0, 1, 2, 3, 4, 7, 8, 9, 12, 16, 21, 22, 64, 72, 104, 112, 0x200, 0x1000, 0x3fffff, 0x400000, 0x7fffffff, 0xffffffff,
];
const FLAGS = [COPIED, 0n, COPIED | 1n, 1n, COMPRESSED, COMPRESSED | (1n << 61n)];

function mutate({ bytes, places, offsets }: Sound, list: readonly Edit[]): Buffer {
  const copy = Buffer.from(bytes);
  for (const { kind, place, value } of list) {
    const at = Math.min(places[place % places.length] as number, copy.length - 8);
    if (kind === "flip") copy[at + (value & 7)] = (copy[at + (value & 7)] as number) ^ (1 << ((value >> 3) & 7));
    else if (kind === "byte") copy[at + (value & 7)] = value >> 3;
    else if (kind === "u32") copy.writeUInt32BE(U32[value % U32.length] as number, at);
    else if (kind === "u64") copy.writeBigUInt64BE(U64[value % U64.length] as bigint, at);
    else if (kind === "pointer") {
      const flags = FLAGS[(value >> 8) % FLAGS.length] as bigint;
      copy.writeBigUInt64BE((offsets[value % offsets.length] as bigint) | flags, at);
    } else {
      const other = Math.min(places[value % places.length] as number, copy.length - 8);
      const held = copy.readBigUInt64BE(at);
      copy.writeBigUInt64BE(copy.readBigUInt64BE(other), at);
      copy.writeBigUInt64BE(held, other);
    }
  }
  return copy;
}

type Outcome =
  | { readonly kind: "refused" | "damaged" | "unreadable" }
  | { readonly kind: "sound"; readonly content: Buffer; readonly hasBacking: boolean };

async function judge(bytes: Buffer): Promise<Outcome> {
  memory.files.set("image", bytes);
  let isOpen = false;
  try {
    const report = await checkQcow2("image", { signal });
    if (report.errorCount > 0 || report.leakedClusters > 0) {
      must(report.errors.length <= 20, "errors are bounded");
      return { kind: "damaged" };
    }
    const backing = bytes.readBigUInt64BE(8) !== 0n && bytes.readUInt32BE(16) !== 0;
    await using chain = await openChain(backing ? ["image", "base"] : ["image"], signal);
    isOpen = true;
    const content = Buffer.alloc(Math.min(chain.virtualBytes, 2 * DISK_BYTES));
    await chain.read(0, content, signal);
    return { kind: "sound", content, hasBacking: backing };
  } catch (error) {
    expectHostError(error);
    return { kind: isOpen ? "unreadable" : "refused" };
  }
}

/**
 * What QEMU can be asked about: it leaves out the rest of a disk's last sector, which a raw view refuses, and it
 * opens the backing file by its name.
 */
function isForQemu(bytes: Buffer): boolean {
  const at = Number(bytes.readBigUInt64BE(8));
  const name = bytes.toString("latin1", at, at + bytes.readUInt32BE(16));
  return bytes.readBigUInt64BE(24) % 512n === 0n && (at === 0 || name === "" || name === "base");
}

/** One in so many images that were changed and are sound is shown to QEMU. */
const ONE_IN = 80;

function askQemu(name: string, bytes: Buffer, { content, hasBacking }: Outcome & { kind: "sound" }): void {
  const folder = dir.file("judged");
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, "image"), bytes);
  writeFileSync(join(folder, "content"), content);
  if (hasBacking) writeFileSync(join(folder, "base"), memory.files.get("base") as Buffer);
  try {
    qemuImg("check", "-f", "qcow2", join(folder, "image")); // fails for errors, leaks, and what it cannot open
  } catch (error) {
    throw new Error(`QEMU does not find ${name} sound`, { cause: error });
  }
  qemuCompare(join(folder, "content"), join(folder, "image"));
  rmSync(folder, { recursive: true });
}

describe("checkQcow2() and Qcow2Chain", () => {
  it(
    "survive changed headers and tables, and call sound only what QEMU calls sound and reads the same",
    async (context) => {
      requireTool(context, "qemu-img");
      const tally = new Tally();
      const shown: Array<{ name: string; bytes: Buffer; outcome: Outcome & { kind: "sound" } }> = [];
      await fc.assert(
        fc.asyncProperty(fc.nat(images.length - 1), edits, async (index, list) => {
          const image = images[index] as Sound;
          const bytes = mutate(image, list);
          memory.readBytes = 0;
          const outcome = await judge(bytes);
          must(memory.readBytes < 64 * (bytes.length + DISK_BYTES), `${memory.readBytes} bytes were read`);
          const isChanged = !bytes.equals(image.bytes);
          if (!isChanged) must(outcome.kind === "sound", `${image.name} as it was is sound`);
          else if (outcome.kind === "sound" && isForQemu(bytes) && tally.of("sound") % ONE_IN === 0) {
            shown.push({ name: `${image.name} ${JSON.stringify(list)}`, bytes, outcome });
          }
          tally.add(isChanged ? outcome.kind : "unchanged");
        }),
        { seed: 31, numRuns: CASES },
      );
      tally.expectAtLeast({ refused: 10_000, damaged: 30_000, unreadable: 1, sound: 3000, unchanged: 1000 });
      for (const { name, bytes, outcome } of shown) askQemu(name, bytes, outcome);
    },
    CASES_TIMEOUT_MS,
  );
});
