// SPDX-License-Identifier: AGPL-3.0-or-later
import { afterEach, describe, expect, it, vi } from "vitest";
import { CLUSTER_BYTES } from "../../../src/block/copy-content.ts";
import { copyDevice, POOL_SLOTS, READ_BYTES, READS_IN_FLIGHT } from "../../../src/block/copy-device.ts";
import { endOf } from "../../../src/block/index.ts";
import { FakeSource, fakeCopy, freeSlots, KIB, MIB } from "../source/fakes.ts";

afterEach(() => void vi.useRealTimers());

const waitForAbort = (signal: AbortSignal): Promise<never> =>
  new Promise((_resolve, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });

describe("copyDevice()", () => {
  it("reads nothing that is known to be zero, and nothing outside what the source names", async () => {
    const source = new FakeSource(8 * MIB, [
      { offset: 0, length: MIB, zero: true },
      { offset: 2 * MIB, length: MIB, zero: false },
      { offset: 5 * MIB, length: 128 * KIB, zero: false },
    ]);
    const copy = fakeCopy(source);
    const result = await copyDevice(copy);
    expect(source.reads).toEqual([
      { offset: 2 * MIB, length: MIB },
      { offset: 5 * MIB, length: 128 * KIB },
    ]);
    expect(copy.target.written).toEqual([
      { kind: "zero", offset: 0, length: MIB, first: undefined },
      { kind: "data", offset: 2 * MIB, length: MIB, first: 0xd5 },
      { kind: "data", offset: 5 * MIB, length: 128 * KIB, first: 0xd5 },
    ]);
    expect(result).toMatchObject({ totalBytes: 2 * MIB + 128 * KIB, readBytes: MIB + 128 * KIB, zeroBytes: MIB });
  });

  it("writes zero clusters where data turns out to be zero, so that the base does not shine through", async () => {
    const source = new FakeSource(MIB);
    source.answer = async (_offset, target) => {
      target.fill(0);
      target[3 * CLUSTER_BYTES + 77] = 1;
    };
    const copy = fakeCopy(source);
    await copyDevice(copy);
    expect(copy.target.written).toEqual([
      { kind: "zero", offset: 0, length: 3 * CLUSTER_BYTES, first: undefined },
      { kind: "data", offset: 3 * CLUSTER_BYTES, length: CLUSTER_BYTES, first: 0 },
      { kind: "zero", offset: 4 * CLUSTER_BYTES, length: 12 * CLUSTER_BYTES, first: undefined },
    ]);
  });

  it("completes a cluster that is dirty in part from the base, and from zeroes where there is none", async () => {
    const extents = [
      { offset: 4 * KIB, length: 4 * KIB, zero: false },
      { offset: 20 * KIB, length: 4 * KIB, zero: true },
    ];
    for (const hasBase of [true, false]) {
      const clusters: Buffer[] = [];
      const base = { read: async (_offset: number, bytes: Buffer) => void bytes.fill(0xba) };
      const copy = fakeCopy(new FakeSource(MIB, extents), { base: hasBase ? base : undefined });
      copy.target.writeData = async (_offset, bytes) => void clusters.push(Buffer.from(bytes));
      await copyDevice(copy);
      const expected = Buffer.alloc(CLUSTER_BYTES, hasBase ? 0xba : 0);
      expected.fill(0xd5, 4 * KIB, 8 * KIB).fill(0, 20 * KIB, 24 * KIB);
      expect(copy.source.reads).toEqual([{ offset: 4 * KIB, length: 4 * KIB }]);
      expect(Buffer.concat(clusters).equals(expected)).toBe(true);
    }
  });

  it("keeps many reads in flight, but no more than it says", async () => {
    const source = new FakeSource(64 * READ_BYTES);
    source.answer = async (_offset, target) => {
      await new Promise((resolve) => setTimeout(resolve, 2));
      target.fill(1);
    };
    await copyDevice(fakeCopy(source));
    expect(source.mostInFlight).toBe(READS_IN_FLIGHT);
    expect(READS_IN_FLIGHT).toBeGreaterThanOrEqual(4);
  });

  it("never says more than one progress line a second", async () => {
    vi.useFakeTimers({ toFake: ["performance"] });
    const source = new FakeSource(200 * MIB);
    source.answer = async (_offset, target) => {
      vi.advanceTimersByTime(300);
      target.fill(1);
    };
    const copy = fakeCopy(source);
    await copyDevice(copy);
    const times = copy.lines.map(({ ms }) => ms);
    expect(times.length).toBeGreaterThan(2);
    expect(copy.lines[0]?.message).toMatch(
      /^drive-scsi0: +\d+% \(.* of 200(\.0)? MiB.*\) in .*, read: .*, zero: .*, written: .*\/s/,
    );
    for (const [at, ms] of times.entries()) if (at > 0) expect(ms - (times[at - 1] ?? 0)).toBeGreaterThanOrEqual(1000);
  });
});

describe("copyDevice() discards", () => {
  const dirty = [0, 90, 180].map((mib) => ({ offset: mib * MIB + 16 * KIB, length: 70 * MIB, zero: false }));

  it("only what was copied, only below the watermark, and most of it", async () => {
    const source = new FakeSource(256 * MIB, dirty);
    const copy = fakeCopy(source);
    copy.target.lagBytes = 10 * MIB;
    source.onDiscard = async (range) => {
      expect(endOf(range)).toBeLessThanOrEqual(copy.target.writtenWatermark);
      expect(source.covers(range)).toBe(true);
    };
    await copyDevice(copy);
    expect(copy.lines.filter(({ level }) => level === "warn")).toEqual([]); // a failed expectation would show here
    expect(source.discards.reduce((sum, { length }) => sum + length, 0)).toBeGreaterThan(128 * MIB);
    for (const [at, range] of source.discards.entries()) {
      const before = source.discards[at - 1];
      if (before !== undefined) expect(range.offset).toBeGreaterThanOrEqual(endOf(before));
    }
  });

  it("nothing while nothing is safe", async () => {
    const copy = fakeCopy(new FakeSource(128 * MIB));
    copy.target.lagBytes = 128 * MIB;
    await copyDevice(copy);
    expect(copy.source.discards).toEqual([]);
  });

  it("nothing where the server cannot", async () => {
    const source = new FakeSource(128 * MIB);
    source.canDiscard = false;
    await copyDevice(fakeCopy(source));
    expect(source.discards).toEqual([]);
  });

  it("no more after a discard that failed, warns once, and the copy goes on", async () => {
    const source = new FakeSource(256 * MIB);
    source.onDiscard = () => Promise.reject(new Error("Operation not supported"));
    const copy = fakeCopy(source);
    expect((await copyDevice(copy)).readBytes).toBe(256 * MIB);
    expect(source.discards).toHaveLength(1);
    expect(copy.lines.filter(({ level }) => level === "warn").map(({ message }) => message)).toEqual([
      "drive-scsi0: no more discards of the fleecing image: Operation not supported",
    ]);
  });
});

describe("a copy that fails", () => {
  it("says the error of the read, gives all buffers back, and can be followed by another", async () => {
    const source = new FakeSource(64 * READ_BYTES);
    source.answer = async (offset, target) => {
      await new Promise((resolve) => setImmediate(resolve));
      if (offset === 9 * READ_BYTES) throw new Error("read 9");
      target.fill(1);
    };
    const copy = fakeCopy(source);
    await expect(copyDevice(copy)).rejects.toThrow("read 9");
    expect(await freeSlots(copy.pool)).toBe(POOL_SLOTS);
    expect(source.inFlight).toBe(0);
    await copyDevice({ ...copy, source: new FakeSource(64 * READ_BYTES) });
  });

  it("does not wait for the other reads of a server that has failed one", async () => {
    const source = new FakeSource(64 * READ_BYTES);
    source.answer = async (offset, _target, signal) => {
      if (offset === 2 * READ_BYTES) throw new Error("the first error");
      await waitForAbort(signal);
    };
    const copy = fakeCopy(source);
    await expect(copyDevice(copy)).rejects.toThrow("the first error");
    expect(await freeSlots(copy.pool)).toBe(POOL_SLOTS);
  });

  it("does not wait for reads after a write has failed, and starts no more of them", async () => {
    const source = new FakeSource(256 * READ_BYTES);
    source.answer = async (offset, target, signal) => {
      if (offset >= 4 * READ_BYTES) await waitForAbort(signal);
      target.fill(1);
    };
    const copy = fakeCopy(source);
    copy.target.onWrite = async (offset) => {
      if (offset === 2 * READ_BYTES) throw new Error("no space left on the device");
    };
    await expect(copyDevice(copy)).rejects.toThrow("no space left on the device");
    expect(source.reads.length).toBeLessThanOrEqual(READS_IN_FLIGHT + 4);
    expect(await freeSlots(copy.pool)).toBe(POOL_SLOTS);
  });

  it("says the first of several errors", async () => {
    const source = new FakeSource(64 * READ_BYTES);
    const copy = fakeCopy(source);
    copy.target.onWrite = async (offset) => {
      await new Promise((resolve) => setTimeout(resolve, 1));
      throw new Error(`write ${offset / READ_BYTES}`);
    };
    await expect(copyDevice(copy)).rejects.toThrow("write 0");
  });

  it("waits for the writes that still use its buffers", async () => {
    const source = new FakeSource(8 * READ_BYTES);
    let writing = 0;
    const copy = fakeCopy(source);
    source.answer = async (offset, target) => {
      target.fill(1);
      if (offset === 6 * READ_BYTES) throw new Error("gone");
    };
    copy.target.onWrite = async () => {
      writing++;
      await new Promise((resolve) => setTimeout(resolve, 30));
      writing--;
    };
    await expect(copyDevice(copy)).rejects.toThrow("gone");
    expect(copy.target.written.length).toBeGreaterThan(0);
    expect(writing).toBe(0);
  });

  it("ends with the reason of its signal when it is cancelled", async () => {
    const cancel = new AbortController();
    const source = new FakeSource(64 * READ_BYTES);
    source.answer = async (offset, target, signal) => {
      if (offset === 6 * READ_BYTES) cancel.abort(new Error("cancelled by the user"));
      if (offset > 4 * READ_BYTES) await waitForAbort(signal);
      target.fill(1);
    };
    const copy = fakeCopy(source, { signal: cancel.signal });
    await expect(copyDevice(copy)).rejects.toThrow("cancelled by the user");
    expect(await freeSlots(copy.pool)).toBe(POOL_SLOTS);
  });
});
