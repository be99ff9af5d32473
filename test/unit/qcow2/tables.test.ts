// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import {
  decodeL1Entry,
  decodeL2Entry,
  decodeRefcount,
  decodeRefcountTableEntry,
  encodeCompressedEntry,
  encodeDataEntry,
  encodeL1Entry,
  encodeZeroEntry,
} from "../../../src/qcow2/tables.ts";

const CLUSTER = 65536;

describe("decodeL2Entry()", () => {
  it("tells the kinds of clusters apart", () => {
    expect(decodeL2Entry(0n, CLUSTER, 3)).toEqual({ kind: "unallocated" });
    expect(decodeL2Entry(1n, CLUSTER, 3)).toEqual({ kind: "zero", hostOffset: 0, isCopied: false });
    expect(decodeL2Entry(0x8000000000050001n, CLUSTER, 3)).toEqual({
      kind: "zero",
      hostOffset: 0x50000,
      isCopied: true,
    });
    expect(decodeL2Entry(0x8000000000050000n, CLUSTER, 3)).toEqual({
      kind: "data",
      hostOffset: 0x50000,
      isCopied: true,
    });
    expect(decodeL2Entry(0x0000000000050000n, CLUSTER, 3)).toEqual({
      kind: "data",
      hostOffset: 0x50000,
      isCopied: false,
    });
  });

  it("reads a compressed descriptor: offset in bits 0 to 53, additional sectors in 54 to 61", () => {
    // One additional sector; the stream begins 2 bytes before the end of a sector: 2 + 512 bytes.
    expect(decodeL2Entry(0x40400000000501fen, CLUSTER, 3)).toEqual({
      kind: "compressed",
      hostOffset: 0x501fe,
      length: 514,
    });
    // 512 byte clusters: offset in bits 0 to 60, one bit of sectors.
    expect(decodeL2Entry(0x6000000000001000n, 512, 3)).toEqual({
      kind: "compressed",
      hostOffset: 0x1000,
      length: 1024,
    });
  });

  it("uses bits 9 to 55 for the offset, bit 55 included", () => {
    expect(() => decodeL2Entry(0x0080000000000000n, CLUSTER, 3)).toThrow(/not below 2\^53/);
    expect(decodeL2Entry(0x0010000000000000n, CLUSTER, 3)).toMatchObject({ hostOffset: 2 ** 52 });
  });

  it.each([
    ["an offset that is not cluster-aligned", 0x8000000000050200n, /not cluster-aligned/],
    ["reserved bit 1", 0x8000000000050002n, /reserved/],
    ["reserved bit 8", 0x8000000000050100n, /reserved/],
    ["reserved bit 56", 0x0100000000050000n, /reserved/],
    ["reserved bit 61", 0x2000000000050000n, /reserved/],
    ["a compressed cluster that claims to be copied", 0xc000000000050000n, /copied/],
  ])("rejects %s", (_, entry, message) => {
    expect(() => decodeL2Entry(entry, CLUSTER, 3)).toThrow(message);
  });
});

describe("encodeCompressedEntry()", () => {
  it.each([
    [0x10000, 1, 0x4000000000010000n],
    [0x10000, 512, 0x4000000000010000n],
    [0x10000, 513, 0x4040000000010000n],
    [0x101ff, 1, 0x40000000000101ffn],
    [0x101ff, 2, 0x40400000000101ffn],
    [0x101ff, 65535, 0x60000000000101ffn], // 128 additional sectors
  ])("describes a stream at %i of %i bytes", (hostOffset, length, entry) => {
    expect(encodeCompressedEntry(hostOffset, length, CLUSTER)).toBe(entry);
  });
});

describe("the other entries", () => {
  it("carry the copied flag in bit 63, but for zero clusters", () => {
    expect(encodeL1Entry(0x30000)).toBe(0x8000000000030000n);
    expect(encodeDataEntry(0x40000)).toBe(0x8000000000040000n);
    expect(encodeZeroEntry()).toBe(1n);
  });

  it("are refused with reserved bits or an offset that is not aligned", () => {
    expect(decodeL1Entry(0x8000000000030000n, CLUSTER)).toEqual({ l2Offset: 0x30000, isCopied: true });
    expect(() => decodeL1Entry(0x4000000000030000n, CLUSTER)).toThrow(/reserved/);
    expect(() => decodeL1Entry(0x8000000000030001n, CLUSTER)).toThrow(/reserved/);
    expect(() => decodeL1Entry(0x8000000000030200n, CLUSTER)).toThrow(/aligned/);
    expect(decodeRefcountTableEntry(0x30000n, CLUSTER)).toBe(0x30000);
    expect(() => decodeRefcountTableEntry(0x30001n, CLUSTER)).toThrow(/reserved/);
    expect(() => decodeRefcountTableEntry(0x30200n, CLUSTER)).toThrow(/aligned/);
    expect(() => decodeRefcountTableEntry(1n << 60n, CLUSTER)).toThrow(/2\^53/);
  });
});

describe("decodeRefcount()", () => {
  it("reads entries of 1 to 64 bits, small ones from the low bit on", () => {
    const block = Buffer.from("e1020304050607080910111213141516", "hex");
    expect([0, 1, 4, 5, 7].map((index) => decodeRefcount(block, index, 0))).toEqual([1, 0, 0, 1, 1]);
    expect([0, 1, 2, 3].map((index) => decodeRefcount(block, index, 1))).toEqual([1, 0, 2, 3]);
    expect([0, 1, 2].map((index) => decodeRefcount(block, index, 2))).toEqual([1, 0xe, 2]);
    expect(decodeRefcount(block, 1, 3)).toBe(2);
    expect(decodeRefcount(block, 1, 4)).toBe(0x0304);
    expect(decodeRefcount(block, 1, 5)).toBe(0x05060708);
    expect(decodeRefcount(block, 1, 6)).toBe(Number.MAX_SAFE_INTEGER);
  });
});
