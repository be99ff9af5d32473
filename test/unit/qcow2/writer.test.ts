// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { AlignedPool } from "../../../src/block/index.ts";
import { Qcow2Writer } from "../../../src/qcow2/index.ts";
import type { Qcow2WriterOptions } from "../../../src/qcow2/writer.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { digestQcow2File, newFileAt, verifyQcow2File } from "../../support/qcow2/open-images.ts";
import {
  MIB,
  openFiles,
  patchFile,
  qemuCheck,
  randomBytes,
  scratchDir,
  shellDigest,
  textBytes,
} from "../../support/qcow2/qcow2-images.ts";

const { signal } = new AbortController();
const CLUSTER = 65536;

function create(path: string, options: Partial<Qcow2WriterOptions> = {}): Promise<Qcow2Writer> {
  return Qcow2Writer.create({ file: newFileAt(path), virtualBytes: 16 * MIB, compression: "none", signal, ...options });
}

/** Counts the WebAssembly memories that are made from now on. */
function countMemories(): Disposable & { readonly made: number } {
  const wasm = Reflect.get(globalThis, "WebAssembly") as { Memory: new (pages: object) => object };
  const { Memory } = wasm;
  let made = 0;
  wasm.Memory = class extends Memory {
    constructor(pages: object) {
      super(pages);
      made++;
    }
  };
  return {
    get made() {
      return made;
    },
    [Symbol.dispose]: () => {
      wasm.Memory = Memory;
    },
  };
}

describe("Qcow2Writer.create()", () => {
  it("makes a file that only its owner can read", async () => {
    using dir = scratchDir();
    await using writer = await create(dir.file("a"));
    await writer.finish();
    expect((statSync(dir.file("a")).mode & 0o777).toString(8)).toBe("600");
  });

  it("refuses a path that exists, and leaves it alone", async () => {
    using dir = scratchDir();
    writeFileSync(dir.file("a"), "precious");
    await expect(create(dir.file("a"))).rejects.toThrow(/Cannot create ".*a": it already exists \(EEXIST\)/);
    expect(readFileSync(dir.file("a"), "utf8")).toBe("precious");
  });

  it.each([
    [{ virtualBytes: -1 }, /disk of -1 bytes/],
    [{ virtualBytes: 2 ** 52 }, /expected 0 to/],
    [{ virtualBytes: 2 ** 44, clusterBits: 9 }, /disk of 17592186044416 bytes/],
    [{ clusterBits: 8 }, /clusters of 8 bits/],
    [{ clusterBits: 17 }, /clusters of 17 bits/],
    [{ backing: { file: "x".repeat(1024), format: "qcow2" as const } }, /at most 1023/],
  ])("refuses %j before it creates anything", async (options, message) => {
    using dir = scratchDir();
    await expect(create(dir.file("a"), options)).rejects.toThrow(message);
    expect(readdirSync(dir.path)).toEqual([]);
  });
});

describe("Qcow2Writer.writeData()", () => {
  it.each([
    ["an offset within a cluster", 512, CLUSTER],
    ["a length that is no whole cluster", 0, CLUSTER + 512],
    ["what lies beyond the end", 16 * MIB, CLUSTER],
    ["nothing", 0, 0],
  ])("refuses %s and works on", async (_, offset, length) => {
    using dir = scratchDir();
    await using writer = await create(dir.file("a"));
    await expect(writer.writeData(offset, Buffer.alloc(length))).rejects.toThrow(/Cannot write \d+ bytes at/);
    await writer.writeData(0, Buffer.alloc(CLUSTER, 1));
    expect((await writer.finish()).dataClusters).toBe(1);
  });

  it("refuses to go back", async () => {
    using dir = scratchDir();
    await using writer = await create(dir.file("a"));
    await writer.writeData(CLUSTER, Buffer.alloc(CLUSTER, 1));
    await expect(writer.writeData(0, Buffer.alloc(CLUSTER, 1))).rejects.toThrow(/from 131072 on/);
    await expect(writer.writeZero(CLUSTER, CLUSTER)).rejects.toThrow(/from 131072 on/);
  });

  it("accepts the end of a disk that is no whole sector; the header rounds up", async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    await using writer = await create(dir.file("a"), { virtualBytes: CLUSTER + 100 });
    await writer.writeData(0, randomBytes(CLUSTER + 100, 1));
    expect(await writer.finish()).toMatchObject({ virtualBytes: CLUSTER + 512, dataClusters: 2 });
    expect(qemuCheck(dir.file("a")).status).toBe(0);
  });

  it.each(["none", "zlib"] as const)("raises the watermark only to what is in the file (%s)", async (compression) => {
    using dir = scratchDir();
    await using writer = await create(dir.file("a"), { compression });
    expect(writer.writtenWatermark).toBe(0);
    const pool = new AlignedPool(MIB, 8);
    for (let at = 0; at < 8; at++) {
      const { bytes } = await pool.acquire(signal);
      randomBytes(MIB, at + 1).copy(bytes);
      await writer.writeData(at * MIB, bytes);
      const mark = writer.writtenWatermark;
      expect(mark).toBeLessThanOrEqual((at + 1) * MIB);
      // Random data is stored as it is, in order, behind the 64 KiB of the header.
      expect(statSync(dir.file("a")).size).toBeGreaterThanOrEqual(mark > 0 ? mark + CLUSTER : 0);
    }
    expect(writer.writtenWatermark).toBeGreaterThan(6 * MIB);
    await writer.writeZero(8 * MIB, 8 * MIB);
    await writer.finish();
    expect(writer.writtenWatermark).toBe(16 * MIB);
  });

  it("does not count compressed data that waits in memory as written", async () => {
    using dir = scratchDir();
    await using writer = await create(dir.file("a"), { compression: "zlib" });
    await writer.writeData(0, textBytes(MIB, 1));
    await writer.writeZero(MIB, MIB);
    expect(statSync(dir.file("a")).size).toBe(0); // one pack holds it all
    expect(writer.writtenWatermark).toBe(0);
    await writer.finish();
    expect(writer.writtenWatermark).toBe(2 * MIB);
  });

  it.each(["none", "zlib"] as const)("takes no new memory for the disks after the first (%s)", async (compression) => {
    using dir = scratchDir();
    using memories = countMemories();
    let afterFirst = -1;
    for (let disk = 0; disk < (compression === "none" ? 20 : 4); disk++) {
      using pool = new AlignedPool(MIB, 4);
      await using writer = await create(dir.file(`${disk}`), { compression });
      const slot = await pool.acquire(signal);
      randomBytes(MIB / 2, disk).copy(slot.bytes);
      await writer.writeData(0, slot.bytes).finally(slot.release);
      if (disk % 4 !== 2) await writer.finish(); // a failed one gives back its memory too
      if (disk === 0) afterFirst = memories.made;
    }
    expect(memories.made).toBe(afterFirst);
  });

  it("does not touch the bytes after its promise has settled", async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    await using writer = await create(dir.file("a"));
    const { bytes } = await new AlignedPool(MIB, 1).acquire(signal);
    for (let at = 0; at < 8; at++) {
      bytes.fill(at + 1);
      await writer.writeData(at * MIB, bytes);
    }
    const { digest } = await writer.finish();
    expect(await digestQcow2File(dir.file("a"), digest.algorithm, signal)).toEqual(digest);
  });
});

describe("Qcow2Writer.finish()", () => {
  it("returns the digest that a shell computes, and verifyFile() confirms it until a bit changes", async (context) => {
    requireTool(context, "xxhsum");
    using dir = scratchDir();
    const path = dir.file("a");
    await using writer = await create(path);
    await writer.writeData(0, randomBytes(3 * MIB, 9));
    const { digest, fileBytes } = await writer.finish();
    expect(digest).toEqual({ algorithm: "xxh3-128", value: shellDigest(path) });
    expect(await verifyQcow2File(path, digest, signal)).toBe(true);
    for (const at of [30, 65536, fileBytes - 1]) {
      const [byte] = readFileSync(path).subarray(at);
      patchFile(path, at, Buffer.of((byte ?? 0) ^ 1));
      expect(await verifyQcow2File(path, digest, signal)).toBe(false);
      patchFile(path, at, Buffer.of(byte ?? 0));
    }
    expect(await verifyQcow2File(path, digest, signal)).toBe(true);
  });

  it("leaves no file that passes for an image until it is through", async () => {
    using dir = scratchDir();
    await using writer = await create(dir.file("a"));
    await writer.writeData(0, randomBytes(4 * MIB, 1));
    // Whatever has reached the file by now: its head is a hole.
    expect(
      readFileSync(dir.file("a"))
        .subarray(0, CLUSTER)
        .every((byte) => byte === 0),
    ).toBe(true);
    await writer.finish();
    expect(readFileSync(dir.file("a")).subarray(0, 4).toString("hex")).toBe("514649fb");
  });

  it("closes the file, and refuses whatever comes later", async () => {
    using dir = scratchDir();
    const writer = await create(dir.file("a"));
    await writer.finish();
    expect(openFiles(dir.path)).toEqual([]);
    await expect(writer.writeData(0, Buffer.alloc(CLUSTER))).rejects.toThrow(/is finished/);
    await expect(writer.finish()).rejects.toThrow(/is finished/);
    await writer[Symbol.asyncDispose]();
    expect(existsSync(dir.file("a"))).toBe(true);
  });
});

describe("Qcow2Writer[Symbol.asyncDispose]()", () => {
  it.each(["none", "zstd"] as const)(
    "deletes the partial file and closes it, twice without harm (%s)",
    async (compression) => {
      using dir = scratchDir();
      const writer = await create(dir.file("a"), { compression });
      const running = Promise.allSettled([writer.writeData(0, randomBytes(4 * MIB, 1))]);
      await writer[Symbol.asyncDispose]();
      await writer[Symbol.asyncDispose]();
      await running;
      expect(readdirSync(dir.path)).toEqual([]);
      expect(openFiles(dir.path)).toEqual([]);
      await expect(writer.writeZero(4 * MIB, CLUSTER)).rejects.toThrow(/is closed/);
    },
  );
});

describe("Qcow2Writer after an error", () => {
  it.each(["none", "zlib", "zstd"] as const)(
    "says that the disk is full, again and again (%s)",
    async (compression) => {
      using dir = scratchDir();
      const mount = dir.file("small");
      mkdirSync(mount);
      try {
        execFileSync("mount", ["-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], { stdio: "ignore" });
      } catch {
        if (process.env.REQUIRE_TOOLS === "1" && process.getuid?.() === 0) throw new Error("cannot mount a tmpfs");
        console.info("skipped: needs the right to mount a tmpfs");
        return;
      }
      try {
        await using writer = await create(`${mount}/a`, { compression });
        const pool = new AlignedPool(MIB, 16);
        const calls: Array<Promise<void>> = [];
        for (let at = 0; at < 16; at++) {
          const { bytes } = await pool.acquire(signal);
          randomBytes(MIB, at + 1).copy(bytes);
          calls.push(writer.writeData(at * MIB, bytes));
        }
        await Promise.allSettled(calls);
        const full = `Cannot write "${mount}/a": no space left on the device (ENOSPC)`;
        await expect(writer.finish()).rejects.toMatchObject({ message: full, code: "ENVIRONMENT", errno: "ENOSPC" });
        await expect(writer.finish()).rejects.toThrow(full);
        const failures = (await Promise.allSettled(calls)).filter((call) => call.status === "rejected");
        expect(failures.length).toBeGreaterThan(0);
        for (const { reason } of failures) expect((reason as Error).message).toBe(full);
        expect(writer.writtenWatermark).toBeLessThanOrEqual(4 * MIB); // the hole of the header takes no space
        await writer[Symbol.asyncDispose]();
        expect(readdirSync(mount)).toEqual([]);
      } finally {
        execFileSync("umount", [mount]);
      }
    },
  );

  it("rejects with the abort reason, and deletes the file", async () => {
    using dir = scratchDir();
    const controller = new AbortController();
    const writer = await create(dir.file("a"), { signal: controller.signal });
    await writer.writeData(0, randomBytes(MIB, 1));
    const reason = new Error("enough");
    controller.abort(reason);
    await expect(writer.writeData(MIB, randomBytes(MIB, 1))).rejects.toBe(reason);
    await expect(writer.finish()).rejects.toBe(reason);
    await writer[Symbol.asyncDispose]();
    expect(readdirSync(dir.path)).toEqual([]);
  });

  it("rejects with the failure of the compressor", async () => {
    using dir = scratchDir();
    const broken = new Error("the worker is gone");
    const compressor = {
      kind: "zlib" as const,
      hasFailed: true,
      compress: () => Promise.reject(broken),
      [Symbol.asyncDispose]: () => Promise.resolve(),
    };
    await using writer = await create(dir.file("a"), { compression: "zlib", compressor });
    await expect(writer.writeData(0, Buffer.alloc(CLUSTER, 1))).rejects.toBe(broken);
    await expect(writer.writeZero(CLUSTER, CLUSTER)).rejects.toBe(broken);
    await expect(writer.finish()).rejects.toBe(broken);
  });
});
