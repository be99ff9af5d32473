// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { type BufferShare, bufferBytesFor, ServerBuffers } from "../../../src/nbd/server-buffers.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
/** 2 MiB and a block before and behind it. */
const LARGE = 2 * MIB + 1024;
const SMALL = 64 * KIB + 1024;

const share = (): BufferShare => ({ heldBytes: 0 });

/** Takes as many buffers as it is given. */
function takeAll(buffers: ServerBuffers, of: BufferShare, bytes: number): Buffer[] {
  const taken: Buffer[] = [];
  for (let next = buffers.take(of, bytes); next !== undefined; next = buffers.take(of, bytes)) taken.push(next);
  return taken;
}

describe("bufferBytesFor()", () => {
  it("gives few sizes, with room for a block before and behind the payload", () => {
    expect([1, 64 * KIB, 64 * KIB + 1, MIB, 2 * MIB].map(bufferBytesFor)).toEqual([
      SMALL,
      SMALL,
      128 * KIB + 1024,
      MIB + 1024,
      LARGE,
    ]);
  });
});

describe("ServerBuffers", () => {
  it("leaves each connection its reserve, whatever the others took", () => {
    const buffers = new ServerBuffers(64 * MIB, 16);
    const shares = Array.from({ length: 16 }, share);
    for (const one of shares.slice(1)) takeAll(buffers, one, SMALL);
    expect(takeAll(buffers, shares[0] as BufferShare, LARGE).length).toBeGreaterThanOrEqual(1);
    expect(buffers.bytes).toBeLessThanOrEqual(64 * MIB);
  });

  it("gives one connection alone half of what is not reserved, and the next one half of the rest", () => {
    const buffers = new ServerBuffers(64 * MIB, 16);
    const common = 64 * MIB - 16 * LARGE;
    const [first, second] = [share(), share()];
    takeAll(buffers, first, SMALL);
    expect(first.heldBytes).toBeGreaterThan(LARGE + common / 2 - SMALL);
    expect(first.heldBytes).toBeLessThanOrEqual(LARGE + common / 2);
    takeAll(buffers, second, SMALL);
    expect(second.heldBytes).toBeGreaterThan(LARGE + common / 4 - SMALL);
    expect(second.heldBytes).toBeLessThanOrEqual(LARGE + common / 4);
  });

  it("uses a released buffer again", () => {
    const buffers = new ServerBuffers(64 * MIB, 16);
    const mine = share();
    const buffer = buffers.take(mine, LARGE) as Buffer;
    buffers.release(mine, buffer);
    expect(mine.heldBytes).toBe(0);
    expect(buffers.take(share(), LARGE)).toBe(buffer);
  });

  it("never keeps more than its limit, unused buffers included", () => {
    const buffers = new ServerBuffers(4 * MIB, 1);
    const mine = share();
    for (const bytes of [SMALL, 128 * KIB + 1024, 256 * KIB + 1024, MIB + 1024, LARGE]) {
      for (const one of takeAll(buffers, mine, bytes)) buffers.release(mine, one);
      expect(buffers.bytes).toBeLessThanOrEqual(4 * MIB);
    }
    buffers.dropSpare();
    expect(buffers.bytes).toBe(0);
  });

  it("serves those that wait in order, past one whose share is used up", () => {
    const buffers = new ServerBuffers(2 * LARGE, 2);
    const [full, other] = [share(), share()];
    const held = takeAll(buffers, full, LARGE);
    const busy = takeAll(buffers, other, LARGE);
    expect([held.length, busy.length]).toEqual([1, 1]);
    const order: string[] = [];
    buffers.wait(full, LARGE, () => order.push("full"));
    buffers.wait(other, LARGE, () => order.push("other"));
    const stop = buffers.wait(other, LARGE, () => order.push("stopped"));
    stop();
    buffers.release(other, busy[0] as Buffer);
    expect(order).toEqual(["other"]);
    buffers.release(full, held[0] as Buffer);
    expect(order).toEqual(["other", "full"]);
  });

  it("serves all for whom one release makes room", () => {
    const buffers = new ServerBuffers(8 * LARGE, 3);
    const [large, first, second] = [share(), share(), share()];
    const held = takeAll(buffers, large, LARGE);
    for (const one of [first, second]) takeAll(buffers, one, SMALL);
    const order: string[] = [];
    buffers.wait(first, SMALL, () => order.push("first"));
    buffers.wait(second, SMALL, () => order.push("second"));
    expect(order).toEqual([]);
    buffers.release(large, held[0] as Buffer);
    expect(order).toEqual(["first", "second"]);
  });

  it("serves all that can be served when a taker takes and waits again", () => {
    const buffers = new ServerBuffers(2 * LARGE, 2);
    const [first, second] = [share(), share()];
    const buffer = buffers.take(first, LARGE) as Buffer;
    const other = buffers.take(second, LARGE) as Buffer;
    let taken = 0;
    const again = (got: Buffer): void => {
      taken++;
      if (taken < 5) {
        buffers.wait(first, LARGE, again);
        buffers.release(first, got);
      }
    };
    let isSecondServed = false;
    buffers.wait(first, LARGE, again);
    buffers.wait(second, LARGE, () => {
      isSecondServed = true;
    });
    buffers.release(first, buffer);
    expect(taken).toBe(5);
    buffers.release(second, other);
    expect(isSecondServed).toBe(true);
  });
});
