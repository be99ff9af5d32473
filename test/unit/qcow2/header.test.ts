// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { decodeQcow2Header, encodeQcow2Header } from "../../../src/qcow2/header.ts";

/** A version 3 header by hand: 1 MiB disk, 64 KiB clusters. Fields in the order of the specification. */
function headerBytes(patch: Record<number, string> = {}): Buffer {
  const bytes = Buffer.alloc(65536);
  Buffer.from(
    "514649fb" + // magic "QFI\xfb"
      "00000003" + // version
      "0000000000000000" + // backing file offset: none
      "00000000" + // backing file name length
      "00000010" + // cluster bits: 16
      "0000000000100000" + // virtual size: 1 MiB
      "00000000" + // encryption: none
      "00000001" + // L1 entries
      "0000000000030000" + // L1 table offset
      "0000000000040000" + // refcount table offset
      "00000001" + // refcount table clusters
      "00000000" + // snapshots
      "0000000000000000" + // snapshots offset
      "0000000000000000" + // incompatible features
      "0000000000000000" + // compatible features
      "0000000000000000" + // autoclear features
      "00000004" + // refcount order: 16 bits
      "00000070" + // header length: 112
      "0000000000000000" + // compression type: zlib, padding
      "0000000000000000", // end of the extensions
    "hex",
  ).copy(bytes);
  for (const [offset, hex] of Object.entries(patch)) Buffer.from(hex, "hex").copy(bytes, Number(offset));
  return bytes;
}

const plain = {
  virtualBytes: 1048576,
  clusterBits: 16,
  l1Entries: 1,
  l1Offset: 0x30000,
  refcountTableOffset: 0x40000,
  refcountTableClusters: 1,
  compression: "zlib",
} as const;

describe("encodeQcow2Header()", () => {
  it("writes a plain header byte for byte", () => {
    expect(encodeQcow2Header(plain)).toEqual(headerBytes().subarray(0, 120));
  });

  it("writes the compression type with its feature bit, the backing format and the backing name", () => {
    const encoded = encodeQcow2Header({ ...plain, compression: "zstd", backing: { file: "../b/x", format: "qcow2" } });
    const expected = headerBytes({
      8: "0000000000000088", // name at 136
      16: "00000006", // name length
      72: "0000000000000008", // incompatible: compression type
      104: "01", // zstd
      112: "e2792aca00000005" + "71636f7732000000", // backing format, 5 bytes, "qcow2", padding
      128: "0000000000000000", // end of the extensions
      136: "2e2e2f622f78", // "../b/x"
    });
    expect(encoded).toEqual(expected.subarray(0, 142));
  });

  it("refuses a backing name that the format has no room for", () => {
    const backing = (length: number) => ({ file: "n".repeat(length), format: "qcow2" });
    expect(() => encodeQcow2Header({ ...plain, backing: backing(1024) })).toThrow(/1024 bytes, at most 1023/);
    expect(encodeQcow2Header({ ...plain, backing: backing(1023) }).length).toBe(136 + 1023);
    expect(() => encodeQcow2Header({ ...plain, clusterBits: 9, backing: backing(400) })).toThrow(/at most 376/);
  });
});

describe("decodeQcow2Header()", () => {
  it("reads every field of a plain header", () => {
    expect(decodeQcow2Header(headerBytes(), "x")).toEqual({
      ...plain,
      version: 3,
      clusterBytes: 65536,
      refcountOrder: 4,
      backing: undefined,
      snapshots: 0,
      isDirty: false,
      hasBitmaps: false,
      hasFeatureNames: false,
    });
  });

  it("reads what it encodes", () => {
    const backing = { file: "../qemu-1/drive-scsi0.qcow2", format: "qcow2" };
    const bytes = Buffer.alloc(65536);
    encodeQcow2Header({ ...plain, compression: "zstd", backing }).copy(bytes);
    expect(decodeQcow2Header(bytes, "x")).toMatchObject({ ...plain, compression: "zstd", backing });
  });

  it("reads a version 2 header, which ends after 72 bytes", () => {
    const bytes = headerBytes({ 4: "00000002", 72: "00".repeat(48) });
    expect(decodeQcow2Header(bytes, "x")).toMatchObject({ version: 2, refcountOrder: 4, compression: "zlib" });
  });

  it.each([
    ["another magic", { 0: "4b444d56" }, /not a qcow2 image \(magic 0x4b444d56\)/],
    ["version 4", { 4: "00000004" }, /version is 4/],
    ["cluster bits 8", { 20: "00000008" }, /cluster bits are 8/],
    ["cluster bits 22", { 20: "00000016" }, /cluster bits are 22/],
    ["cluster bits with the top bit set", { 20: "80000010" }, /cluster bits are 2147483664/],
    ["a disk of 2^64 - 1 bytes", { 24: "ffffffffffffffff" }, /beyond every limit/],
    ["AES encryption", { 32: "00000001" }, /encrypted \(method 1\)/],
    ["LUKS encryption", { 32: "00000002" }, /encrypted \(method 2\)/],
    ["an L1 table above 32 MiB", { 36: "00400001" }, /4194305 entries, too many/],
    ["an L1 table of 2^32 - 1 entries", { 36: "ffffffff" }, /too many/],
    ["an L1 table too small for the disk", { 36: "00000000" }, /too few/],
    ["an L1 table that is not aligned", { 40: "0000000000030200" }, /not cluster-aligned/],
    ["an L1 table beyond 2^53", { 40: "8000000000000000" }, /beyond every limit/],
    ["a refcount table above 8 MiB", { 56: "00000081" }, /129 clusters, too many/],
    ["a refcount table that is not aligned", { 48: "0000000000040001" }, /not cluster-aligned/],
    ["the corrupt bit", { 72: "0000000000000002" }, /marked corrupt/],
    ["an external data file", { 72: "0000000000000004" }, /another file/],
    ["extended L2 entries", { 72: "0000000000000010" }, /extended L2/],
    ["an unknown incompatible feature", { 72: "0000000000000020" }, /unknown incompatible features 0x20/],
    ["the highest unknown incompatible feature", { 72: "8000000000000000" }, /0x8000000000000000/],
    ["refcounts of 128 bits", { 96: "00000007" }, /refcount order is 7/],
    ["a header shorter than version 3 allows", { 100: "00000048" }, /header length 72/],
    ["a header longer than its cluster", { 100: "00010008" }, /header length 65544/],
    ["compression type 2", { 72: "0000000000000008", 104: "02" }, /compression type is 2/],
    ["zstd without its feature bit", { 104: "01" }, /disagree/],
    ["the feature bit without a type", { 72: "0000000000000008" }, /disagree/],
    ["an extension longer than the header", { 112: "e2792acaffffffff" }, /overruns/],
    ["the name of an external data file", { 112: "4441544100000001" + "61" }, /external data file/],
    ["a backing format of 16 bytes", { 112: "e2792aca00000010" }, /backing format has 16 bytes/],
    ["a backing name of 1024 bytes", { 8: "0000000000000100", 16: "00000400" }, /name has 1024 bytes/],
    ["a backing name beyond the cluster", { 8: "0000000000010001", 16: "00000001" }, /not in the first cluster/],
    ["a backing name over the end", { 8: "000000000000fff0", 16: "00000011" }, /overruns/],
    ["a NUL in the backing name", { 8: "0000000000000100", 16: "00000002", 256: "6100" }, /NUL/],
    ["a backing name that is no text", { 8: "0000000000000100", 16: "00000001", 256: "ff" }, /UTF-8/],
  ] as Array<[string, Record<number, string>, RegExp]>)("refuses %s", (_, patch, message) => {
    expect(() => decodeQcow2Header(headerBytes(patch), "x")).toThrow(message);
  });

  it("refuses a file that ends within the header, at every byte", () => {
    for (let length = 0; length < 104; length++) {
      expect(() => decodeQcow2Header(headerBytes().subarray(0, length), "x")).toThrow(/Cannot use image "x"/);
    }
  });
});
