// SPDX-License-Identifier: AGPL-3.0-or-later
import type { FileHandle } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { writeFully } from "../../../src/qcow2/file-io.ts";

/** A file that takes at most the given number of bytes with each call. */
function stingyHandle(takes: number[]): { handle: FileHandle; written: number[][] } {
  const written: number[][] = [];
  const write = async (bytes: Buffer, at: number, length: number, position: number) => {
    const bytesWritten = Math.min(takes.shift() ?? 0, length);
    written.push([...bytes.subarray(at, at + bytesWritten), position]);
    return { bytesWritten, buffer: bytes };
  };
  return { handle: { write } as unknown as FileHandle, written };
}

describe("writeFully()", () => {
  it("goes on where a short write ended", async () => {
    const { handle, written } = stingyHandle([2, 1, 9]);
    await writeFully(handle, Buffer.from([1, 2, 3, 4, 5]), 100);
    expect(written).toEqual([
      [1, 2, 100],
      [3, 102],
      [4, 5, 103],
    ]);
  });

  it("fails when a write takes nothing, instead of asking for ever", async () => {
    const { handle, written } = stingyHandle([2, 0]);
    await expect(writeFully(handle, Buffer.from([1, 2, 3]), 0)).rejects.toThrow(/takes nothing more/);
    expect(written).toHaveLength(2);
  });
});
