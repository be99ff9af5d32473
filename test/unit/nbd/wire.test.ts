// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import {
  checkStatusPayloadBytes,
  decodeChunkHeader,
  decodeErrorPayload,
  decodeRequest,
  decodeSimpleReply,
  decodeStatusPayload,
  encodeChunkHeader,
  encodeErrorPayload,
  encodeRequest,
  encodeSimpleReply,
} from "../../../src/nbd/wire.ts";

const hex = (...fields: string[]): Buffer => Buffer.from(fields.join(""), "hex");

const REQUEST = { type: 7, flags: 8, cookie: 0x0102030405060708n, offset: 0x1_2345_6789, length: 0xfffff000 } as const;
const REQUEST_BYTES = hex(
  "25609513", // request magic
  "0008", // command flags: REQ_ONE
  "0007", // type: BLOCK_STATUS
  "0102030405060708", // cookie
  "0000000123456789", // offset
  "fffff000", // length
);

describe("encodeRequest()", () => {
  it("writes the 28 bytes of the specification", () => {
    expect(encodeRequest(REQUEST)).toEqual(REQUEST_BYTES);
  });
});

describe("decodeRequest()", () => {
  it("reads what encodeRequest() wrote", () => {
    expect(decodeRequest(REQUEST_BYTES)).toEqual(REQUEST);
  });
  it("reads an offset beyond 2^53 as one that no export has", () => {
    const bytes = Buffer.from(REQUEST_BYTES);
    bytes.writeBigUInt64BE(0xffffffffffffffffn, 16);
    expect(decodeRequest(bytes)?.offset).toBe(2 ** 64);
  });
  it("knows another magic", () => {
    expect(decodeRequest(hex("25609514", "00".repeat(24)))).toBeUndefined();
  });
});

describe("decodeSimpleReply()", () => {
  it("reads error and cookie", () => {
    const bytes = hex("67446698", "0000001c", "ffffffffffffffff");
    expect(decodeSimpleReply(bytes)).toEqual({ error: 28, cookie: 0xffffffffffffffffn });
    expect(encodeSimpleReply({ error: 28, cookie: 0xffffffffffffffffn })).toEqual(bytes);
  });
  it("rejects the structured magic", () => {
    expect(() => decodeSimpleReply(hex("668e33ef", "00000000", "0000000000000001"))).toThrow(/0x668e33ef/);
  });
});

describe("decodeChunkHeader()", () => {
  it("reads flags, type, cookie and length", () => {
    const bytes = hex(
      "668e33ef", // structured reply magic
      "0001", // flags: done
      "8002", // type: error with offset
      "0000000000000005", // cookie
      "0000000e", // payload length
    );
    const header = { flags: 1, type: 0x8002, cookie: 5n, payloadBytes: 14 };
    expect(decodeChunkHeader(bytes)).toEqual(header);
    expect(encodeChunkHeader(header)).toEqual(bytes);
  });
  it("rejects a header that carries the simple reply magic", () => {
    expect(() => decodeChunkHeader(hex("67446698", "00000000", "0000000000000001", "00000000"))).toThrow(/0x67446698/);
  });
});

describe("decodeStatusPayload()", () => {
  const payload = hex(
    "00000007", // context id
    ...["00001000", "00000000"], // 4 KiB, data
    ...["00001000", "00000003"], // 4 KiB, hole and zero
    ...["00001000", "00000003"], // the same again
    ...["f0000000", "80000000"], // 3.75 GiB, the highest flag
  );
  it("joins equal neighbours and clips the last extent to the request", () => {
    expect(decodeStatusPayload(payload, 65536, 0x5000)).toEqual({
      contextId: 7,
      extents: [
        { offset: 65536, length: 0x1000, flags: 0 },
        { offset: 69632, length: 0x2000, flags: 3 },
        { offset: 77824, length: 0x2000, flags: 0x80000000 },
      ],
    });
  });
  it("keeps a prefix as it is", () => {
    const prefix = hex("00000001", "00000200", "00000001");
    expect(decodeStatusPayload(prefix, 0, 4096).extents).toEqual([{ offset: 0, length: 512, flags: 1 }]);
  });
  it("rejects an extent of no length", () => {
    expect(() => decodeStatusPayload(hex("00000001", "00000000", "00000000"), 0, 4096)).toThrow(/at 0 has no length/);
  });
  it("rejects an extent that starts where the request ends", () => {
    const two = hex("00000001", "00001000", "00000000", "00001000", "00000001");
    expect(() => decodeStatusPayload(two, 0, 4096)).toThrow(/extent at 4096 is beyond the request/);
  });
});

describe("checkStatusPayloadBytes()", () => {
  it.each([0, 4, 8, 11, 13, 4 + 8 * (2 ** 20 + 1)])("rejects a payload of %d bytes", (payloadBytes) => {
    expect(() => checkStatusPayloadBytes(payloadBytes)).toThrow(/1 to 1048576 extents/);
  });
  it("takes one extent, and 2^20", () => {
    checkStatusPayloadBytes(12);
    checkStatusPayloadBytes(4 + 8 * 2 ** 20);
  });
});

describe("decodeErrorPayload()", () => {
  const plain = hex("00000016", "0003", "6f6f70");
  const placed = hex("00000005", "0001", "78", "0000000000010000");
  it("reads number and text", () => {
    expect(decodeErrorPayload(plain, false)).toEqual({ error: 22, text: "oop", offset: undefined });
    expect(encodeErrorPayload({ error: 22, text: "oop", offset: undefined })).toEqual(plain);
  });
  it("reads the offset behind the text", () => {
    expect(decodeErrorPayload(placed, true)).toEqual({ error: 5, text: "x", offset: 65536 });
    expect(encodeErrorPayload({ error: 5, text: "x", offset: 65536 })).toEqual(placed);
  });
  it.each([
    [hex("00000016", "00"), false, 5],
    [hex("00000016", "0004", "6f6f70"), false, 9],
    [hex("00000005", "0001", "78", "00000000000100"), true, 14],
  ])("rejects %j, which is too short for its fields", (bytes, hasOffset, length) => {
    expect(() => decodeErrorPayload(bytes, hasOffset)).toThrow(new RegExp(`payload has ${length} bytes`));
  });
  it("rejects an offset that is not below 2^53", () => {
    expect(() => decodeErrorPayload(hex("00000005", "0000", "0020000000000000"), true)).toThrow(/not below 2\^53/);
  });
});
