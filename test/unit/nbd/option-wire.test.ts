// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import {
  decodeBlockSize,
  decodeExportInfo,
  decodeGoData,
  decodeGreeting,
  decodeMetaContext,
  decodeMetaContextData,
  decodeOptionHeader,
  decodeOptionReplyHeader,
  encodeBlockSize,
  encodeExportInfo,
  encodeGoData,
  encodeGreeting,
  encodeMetaContext,
  encodeMetaContextData,
  encodeOption,
  encodeOptionReplyHeader,
  encodeServer,
} from "../../../src/nbd/option-wire.ts";

const hex = (...fields: string[]): Buffer => Buffer.from(fields.join(""), "hex");

describe("decodeGreeting()", () => {
  it("reads the handshake flags", () => {
    const bytes = hex("4e42444d41474943", "49484156454f5054", "0003"); // NBDMAGIC IHAVEOPT flags
    expect(decodeGreeting(bytes)).toBe(3);
    expect(encodeGreeting(3)).toEqual(bytes);
  });
  it("says that no NBD server listens there", () => {
    expect(() => decodeGreeting(Buffer.from("SSH-2.0-OpenSSH_9.2p1"))).toThrow(/no NBD server listens there/);
  });
  it("names the oldstyle negotiation", () => {
    expect(() => decodeGreeting(hex("4e42444d41474943", "0000420281861253", "0000"))).toThrow(/oldstyle/);
  });
  it("rejects an unknown second magic", () => {
    expect(() => decodeGreeting(hex("4e42444d41474943", "0000000000000001", "0000"))).toThrow(/second magic is 0x1/);
  });
});

describe("encodeOption()", () => {
  it("writes magic, option, length and data", () => {
    expect(encodeOption(7, hex("abcd"))).toEqual(hex("49484156454f5054", "00000007", "00000002", "abcd"));
  });
});

describe("decodeOptionReplyHeader()", () => {
  it("reads types above 2^31 as unsigned", () => {
    const bytes = hex("0003e889045565a9", "00000007", "80000006", "00000010");
    expect(decodeOptionReplyHeader(bytes)).toEqual({ option: 7, type: 0x80000006, dataBytes: 16 });
    expect(encodeOptionReplyHeader({ option: 7, type: 0x80000006, dataBytes: 16 })).toEqual(bytes);
  });
  it("rejects another magic", () => {
    expect(() => decodeOptionReplyHeader(hex("0003e889045565a8", "00000007", "00000001", "00000000"))).toThrow(/magic/);
  });
});

describe("encodeGoData()", () => {
  it("writes the name, then the information requests", () => {
    expect(encodeGoData("dä", [3])).toEqual(
      hex(
        "00000003", // length of the name in bytes
        "64c3a4", // dä
        "0001", // one request
        "0003", // NBD_INFO_BLOCK_SIZE
      ),
    );
  });
});

describe("encodeMetaContextData()", () => {
  it("writes the name, the number of queries, then each query", () => {
    expect(encodeMetaContextData("d", ["a:b:c"])).toEqual(hex("00000001", "64", "00000001", "00000005", "613a623a63"));
  });
});

describe("decodeMetaContext()", () => {
  it("reads id and name, colons included", () => {
    expect(decodeMetaContext(hex("fffffffe", "613a623a63"))).toEqual({ id: 0xfffffffe, name: "a:b:c" });
  });
  it("rejects one without a name", () => {
    expect(() => decodeMetaContext(hex("00000001"))).toThrow(/4 bytes/);
  });
});

describe("decodeExportInfo()", () => {
  it("reads size and flags", () => {
    expect(decodeExportInfo(hex("0000010000000000", "01ed"))).toEqual({ sizeBytes: 2 ** 40, transmissionFlags: 0x1ed });
  });
  it("rejects a size that is not below 2^53", () => {
    expect(() => decodeExportInfo(hex("0020000000000000", "0001"))).toThrow(/size 9007199254740992 is not below 2\^53/);
  });
  it("rejects another length", () => {
    expect(() => decodeExportInfo(hex("0000010000000000"))).toThrow(/8 bytes, expected 10/);
  });
});

describe("decodeBlockSize()", () => {
  const info = (minimum: number, preferred: number, maximum: number): Buffer => {
    const bytes = Buffer.alloc(12);
    bytes.writeUInt32BE(minimum, 0);
    bytes.writeUInt32BE(preferred, 4);
    bytes.writeUInt32BE(maximum, 8);
    return bytes;
  };
  it("rounds the maximum down to the minimum", () => {
    expect(decodeBlockSize(info(4096, 65536, 1_000_000))).toEqual({
      minimum: 4096,
      preferred: 65536,
      maximum: 999_424,
    });
  });
  it("takes 0xffffffff for no limit, and keeps its own of 32 MiB", () => {
    expect(decodeBlockSize(info(1, 4096, 0xffffffff)).maximum).toBe(32 * 2 ** 20);
  });
  it.each([
    [0, 4096, 65536],
    [3, 4096, 65536],
    [131072, 131072, 1048576],
    [4096, 512, 65536],
    [4096, 4096, 512],
    [0x80000000, 0x80000000, 0x80000000],
  ])("rejects %d, %d, %d", (minimum, preferred, maximum) => {
    expect(() => decodeBlockSize(info(minimum, preferred, maximum))).toThrow(/make no sense/);
  });
  it("rejects another length", () => {
    expect(() => decodeBlockSize(Buffer.alloc(11))).toThrow(/11 bytes, expected 12/);
  });
});

describe("what a server reads", () => {
  const go = hex("00000003", "64c3a4", "0002", "0003", "0001"); // dä, NBD_INFO_BLOCK_SIZE, NBD_INFO_NAME
  const contexts = hex("00000000", "00000002", "00000005", "626173653a", "00000001", "78"); // "", "base:", "x"

  it("is the header of an option", () => {
    const bytes = hex("49484156454f5054", "00000007", "fffffff0");
    expect(decodeOptionHeader(bytes)).toEqual({ option: 7, dataBytes: 0xfffffff0 });
    expect(decodeOptionHeader(hex("4e42444d41474943", "00000007", "00000000"))).toBeUndefined();
  });
  it("is the data of NBD_OPT_GO", () => {
    expect(decodeGoData(go)).toEqual({ exportName: "dä", infoTypes: new Set([3, 1]) });
  });
  it("is the data of NBD_OPT_SET_META_CONTEXT", () => {
    expect(decodeMetaContextData(contexts)).toEqual({ exportName: "", queries: ["base:", "x"] });
  });
  it("must be neither shorter nor longer", () => {
    for (let end = 0; end < go.length; end++) expect(decodeGoData(go.subarray(0, end))).toBeUndefined();
    expect(decodeGoData(Buffer.concat([go, hex("00")]))).toBeUndefined();
    for (let end = 0; end < contexts.length; end++) {
      expect(decodeMetaContextData(contexts.subarray(0, end))).toBeUndefined();
    }
    expect(decodeMetaContextData(Buffer.concat([contexts, hex("00")]))).toBeUndefined();
  });
});

describe("what a server says", () => {
  it("is written as the specification has it", () => {
    expect(encodeServer("ab", "c")).toEqual(hex("00000002", "6162", "63"));
    expect(encodeMetaContext(7, "base:x")).toEqual(hex("00000007", "626173653a78"));
    expect(encodeExportInfo({ sizeBytes: 2 ** 40 + 512, transmissionFlags: 0x183 })).toEqual(
      hex("0000010000000200", "0183"),
    );
    expect(encodeBlockSize({ minimum: 1, preferred: 4096, maximum: 2 ** 25 })).toEqual(
      hex("00000001", "00001000", "02000000"),
    );
  });
});
