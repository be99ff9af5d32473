// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { SparseMapReader } from "../../../src/archive/sparse-member.ts";

/** Two extents: 512 bytes at 0, 4 bytes at 4096. */
const MAP = Buffer.alloc(512);
MAP.write("2\n0\n512\n4096\n4\n");

describe("SparseMapReader", () => {
  it("reads a map that comes one byte at a time, and hands back the data behind it", () => {
    const reader = new SparseMapReader();
    for (const byte of MAP.subarray(0, 511)) expect(reader.push(Buffer.from([byte]), 4100)).toBeUndefined();
    const { extents, rest } = reader.push(Buffer.concat([MAP.subarray(511), Buffer.from("data")]), 4100) ?? {};
    expect(extents).toEqual([
      { offset: 0, length: 512 },
      { offset: 4096, length: 4 },
    ]);
    expect(rest?.toString()).toBe("data");
  });

  it.each([
    ["no number", "two\n"],
    ["a number too long", "1\n0\n9999999999999999\n"],
    ["an extent beyond the file", "1\n4096\n5\n"],
    ["an extent that goes back", "2\n100\n50\n120\n1\n"],
    ["more extents than fit in memory", "99999999999\n"],
  ])("rejects %s", (_title, text) => {
    const bytes = Buffer.alloc(512);
    bytes.write(text);
    expect(() => new SparseMapReader().push(bytes, 4100)).toThrow(/sparse file/);
  });
});
