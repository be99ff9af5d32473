// SPDX-License-Identifier: AGPL-3.0-or-later
// On a real FUSE mount: nbdfuse on nbdkit, bytes compared with the file nbdkit serves.
import type { FileHandle } from "node:fs/promises";
import { describe, expect, it, vi } from "vitest";
import { SeededRandom, seededBytes } from "../../../fixtures/lab/index.ts";
import { AlignedPool } from "../../../src/block/index.ts";
import { FuseDisk, requireFuseTools } from "../../support/vm/fuse-disk.ts";

const never = new AbortController().signal;
const SIZE = 3 * 2 ** 20 + 517; // no multiple of a page, a sector, or anything

describe("FuseFile.read()", () => {
  it("fills any range of any alignment, into any place of a buffer, many at a time", async (context) => {
    requireFuseTools(context);
    const content = seededBytes("odd", SIZE);
    await using disk = await FuseDisk.start(content);
    await using file = await disk.open();
    expect(file.sizeBytes).toBe(SIZE);
    const random = new SeededRandom(7);
    const ranges: Array<readonly [offset: number, length: number, at: number]> = [
      [0, 2 ** 20, 0],
      [SIZE - 517, 517, 0], // what is left behind the last page
      [SIZE - 1, 1, 1],
      [511, 3, 4095],
      [4096, 4096, 512],
      [0, SIZE, 0],
    ];
    for (let at = 0; at < 40; at++) {
      const offset = random.integer(0, SIZE);
      ranges.push([offset, random.integer(1, Math.min(SIZE - offset, 300_000) + 1), random.integer(0, 5000)]);
    }
    using pool = new AlignedPool(4 * 2 ** 20, 8);
    await Promise.all(
      ranges.map(async ([offset, length, at]) => {
        const slot = await pool.acquire(never);
        slot.bytes.fill(0xee);
        await file.read(offset, slot.bytes.subarray(at, at + length), never);
        expect(slot.bytes.subarray(at, at + length).equals(content.subarray(offset, offset + length))).toBe(true);
        expect(slot.bytes[at + length]).toBe(0xee);
        if (at > 0) expect(slot.bytes[at - 1]).toBe(0xee);
        slot.release();
      }),
    );
  });

  it("finishes what the kernel reads in part", async (context) => {
    requireFuseTools(context);
    const content = seededBytes("short", SIZE);
    await using disk = await FuseDisk.start(content);
    await using file = await disk.open();
    const prototype = Object.getPrototypeOf(disk.handle) as FileHandle;
    const read = prototype.read;
    const spy = vi.spyOn(prototype, "read").mockImplementation(function (this: FileHandle, ...args: unknown[]) {
      const [buffer, at, length, position] = args as [Buffer, number, number, number];
      return Reflect.apply(read, this, [buffer, at, Math.min(length, 1000), position]);
    } as never);
    try {
      const bytes = Buffer.alloc(5555);
      await file.read(3333, bytes, never);
      expect(bytes.equals(content.subarray(3333, 3333 + 5555))).toBe(true);
      expect(spy).toHaveBeenCalledTimes(6);
    } finally {
      spy.mockRestore();
    }
  });

  it("says what the end of the file, a read error, and a closed file are", async (context) => {
    requireFuseTools(context);
    await using disk = await FuseDisk.start(Buffer.alloc(SIZE), "error", "error-pread=EIO", "error-pread-rate=100%");
    const file = await disk.open();
    await expect(file.read(SIZE, Buffer.alloc(1), never)).rejects.toThrow(
      `Cannot read "drive-scsi0" through its file handle: it ended at byte ${SIZE}`,
    );
    await expect(file.read(0, Buffer.alloc(512), never)).rejects.toThrow(
      'Cannot read "drive-scsi0": input/output error (EIO)',
    );
    await file[Symbol.asyncDispose]();
    await file[Symbol.asyncDispose]();
    await expect(file.read(0, Buffer.alloc(512), never)).rejects.toThrow("closed");
  });

  it("waits no longer than allowed, and its buffers are free afterwards", async (context) => {
    requireFuseTools(context);
    await using disk = await FuseDisk.start(Buffer.alloc(SIZE), "delay", "rdelay=60");
    await using file = await disk.open(1_000);
    const startMs = performance.now();
    const reads = Array.from({ length: 16 }, (_, at) => file.read(at * 4096, Buffer.alloc(4096), never));
    const ends = await Promise.allSettled(reads);
    expect(performance.now() - startMs).toBeLessThan(20_000);
    for (const end of ends) {
      expect(String((end as PromiseRejectedResult).reason)).toContain(
        'Cannot read "drive-scsi0" through its file handle: no answer for 1 s',
      );
    }
  });

  it("waits no longer for a call that the other side makes with its handle", async (context) => {
    requireFuseTools(context);
    await using disk = await FuseDisk.start(Buffer.alloc(SIZE), "delay", "rdelay=60");
    await using file = await disk.open(1_000);
    const startMs = performance.now();
    await expect(file.watch(() => disk.handle.read(Buffer.alloc(4096), 0, 4096, 0), never)).rejects.toThrow();
    expect(performance.now() - startMs).toBeLessThan(20_000);
  });

  it("ends soon after a cancellation, with its reason", async (context) => {
    requireFuseTools(context);
    await using disk = await FuseDisk.start(Buffer.alloc(SIZE), "delay", "rdelay=60");
    await using file = await disk.open();
    const cancel = new AbortController();
    const reads = Array.from({ length: 16 }, (_, at) => file.read(at * 4096, Buffer.alloc(4096), cancel.signal));
    setTimeout(() => cancel.abort(new Error("stopped by the user")), 100);
    const startMs = performance.now();
    const ends = await Promise.allSettled(reads);
    expect(performance.now() - startMs).toBeLessThan(15_000); // the server would take 60 s
    for (const end of ends) expect((end as PromiseRejectedResult).reason.message).toBe("stopped by the user");
  });
});
