// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { AlignedPool } from "../../../src/block/index.ts";
import { CancelledError } from "../../../src/core/index.ts";

const signal = new AbortController().signal;

describe("AlignedPool", () => {
  it("hands out distinct memory and takes it back", async () => {
    const pool = new AlignedPool(65536, 2);
    const a = await pool.acquire(signal);
    const b = await pool.acquire(signal);
    a.bytes.fill(1);
    b.bytes.fill(2);
    expect([a.bytes[0], b.bytes[65535]]).toEqual([1, 2]);
    const waiting = pool.acquire(signal);
    a.release();
    expect((await waiting).index).toBe(a.index);
  });

  it("ignores a second release: a slot has one holder", async () => {
    const pool = new AlignedPool(65536, 1);
    const first = await pool.acquire(signal);
    first.release();
    const second = await pool.acquire(signal);
    first.release();
    const third = pool.acquire(signal);
    let isThirdServed = false;
    void third.then(() => {
      isThirdServed = true;
    });
    await new Promise((resolve) => setImmediate(resolve));
    expect(isThirdServed).toBe(false);
    second.release();
    await third;
  });

  it("forgets a waiter that was aborted", async () => {
    const pool = new AlignedPool(65536, 1);
    const held = await pool.acquire(signal);
    const controller = new AbortController();
    const aborted = pool.acquire(controller.signal);
    const reason = new CancelledError("Cancelled by the test");
    controller.abort(reason);
    await expect(aborted).rejects.toBe(reason);
    held.release();
    await pool.acquire(signal);
  });

  it("hands its memory on when it is disposed, once", async () => {
    const first = new AlignedPool(7 * 65536, 1);
    first[Symbol.dispose]();
    first[Symbol.dispose]();
    const second = new AlignedPool(7 * 65536, 1);
    const third = new AlignedPool(7 * 65536, 1);
    const other = new AlignedPool(6 * 65536, 1);
    expect(second.memory).toBe(first.memory);
    expect(third.memory).not.toBe(first.memory);
    expect(other.memory.byteLength).toBe(6 * 65536);
  });

  it("keeps its memory while a buffer is held: a write may be in flight", async () => {
    const first = new AlignedPool(5 * 65536, 2);
    const held = await first.acquire(signal);
    const alsoHeld = await first.acquire(signal);
    first[Symbol.dispose]();
    held.release();
    held.release();
    expect(new AlignedPool(5 * 65536, 2).memory).not.toBe(first.memory);
    alsoHeld.release();
    expect(new AlignedPool(5 * 65536, 2).memory).toBe(first.memory);
  });

  it("gives out nothing once it is disposed", async () => {
    const pool = new AlignedPool(65536, 1);
    const held = await pool.acquire(signal);
    const waiting = pool.acquire(signal);
    pool[Symbol.dispose]();
    await expect(waiting).rejects.toThrow("the buffer pool is disposed");
    held.release();
    await expect(pool.acquire(signal)).rejects.toThrow("the buffer pool is disposed");
  });
});
