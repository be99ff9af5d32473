// SPDX-License-Identifier: AGPL-3.0-or-later
// What the server answers to requests, in bytes; test/unit/nbd/server-options.test.ts has the handshake.
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { MemoryExport } from "../../support/nbd/memory-export.ts";
import {
  CMD_BLOCK_STATUS,
  CMD_DISC,
  CMD_FLAG_DF,
  CMD_FLAG_REQ_ONE,
  CMD_READ,
  CMD_TRIM,
  CMD_WRITE,
  CMD_WRITE_ZEROES,
  DONE,
  dataChunk,
  EINVAL,
  EIO,
  EPERM,
  errorChunk,
  holeChunk,
  request,
  simpleReply,
  statusChunk,
} from "../../support/nbd/nbd-bytes.ts";
import { RawClient, serve } from "../../support/nbd/serve-nbd.ts";

const KIB = 1024;
const MIB = 1024 * KIB;

/** Bytes of which no two neighbouring blocks are equal. */
function pattern(length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let at = 0; at + 4 <= length; at += 4) bytes.writeUInt32BE((at * 2654435761 + 1) >>> 0, at);
  return bytes;
}

/** 8 KiB: data, a hole of 2 KiB at 2 KiB, data. Read, the hole has bytes that no client may see. */
const holed = (): MemoryExport =>
  new MemoryExport({ bytes: pattern(8 * KIB), zeroes: [{ offset: 2 * KIB, length: 2 * KIB }] });

describe("READ", () => {
  it("is answered with one chunk of data", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 0xfedcba9876543210n, 4096, 1024));
    expect(await client.takeChunk()).toEqual(
      dataChunk(0xfedcba9876543210n, DONE, 4096, disk.bytes.subarray(4096, 5120)),
    );
    expect(disk.reads).toEqual([{ offset: 4096, length: 1024 }]);
  });

  it("is answered with data and holes, and does not read the holes", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 1, 0, 8192));
    expect(await client.takeChunk()).toEqual(dataChunk(1n, 0, 0, disk.bytes.subarray(0, 2048)));
    expect(await client.takeChunk()).toEqual(holeChunk(1n, 0, 2048, 2048));
    expect(await client.takeChunk()).toEqual(dataChunk(1n, DONE, 4096, disk.bytes.subarray(4096)));
    expect(disk.reads).toEqual([
      { offset: 0, length: 2048 },
      { offset: 4096, length: 4096 },
    ]);
  });

  it("may start and end anywhere; the export is asked for whole blocks", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 2, 1001, 4000));
    expect(await client.takeChunk()).toEqual(dataChunk(2n, 0, 1001, disk.bytes.subarray(1001, 2048)));
    expect(await client.takeChunk()).toEqual(holeChunk(2n, 0, 2048, 2048));
    expect(await client.takeChunk()).toEqual(dataChunk(2n, DONE, 4096, disk.bytes.subarray(4096, 5001)));
    expect(disk.reads).toEqual([
      { offset: 512, length: 1536 },
      { offset: 4096, length: 1024 },
    ]);
  });

  it("of one byte in a hole, and of the bytes around its start", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 3, 3000, 1));
    expect(await client.takeChunk()).toEqual(holeChunk(3n, DONE, 3000, 1));
    client.send(request(CMD_READ, 4, 4090, 10));
    expect(await client.takeChunk()).toEqual(holeChunk(4n, 0, 4090, 6));
    expect(await client.takeChunk()).toEqual(dataChunk(4n, DONE, 4096, disk.bytes.subarray(4096, 4100)));
  });

  it("with DF is answered with a single chunk", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 5, 1001, 4000, CMD_FLAG_DF));
    expect(await client.takeChunk()).toEqual(dataChunk(5n, DONE, 1001, disk.bytes.subarray(1001, 5001)));
  });

  it("is answered with a simple reply where chunks were not negotiated", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", false);
    client.send(request(CMD_READ, 6, 1001, 4000));
    expect(await client.take(16 + 4000)).toEqual(Buffer.concat([simpleReply(6), disk.bytes.subarray(1001, 5001)]));
  });

  it.each([
    ["chunks", true, 0],
    ["a single chunk", true, CMD_FLAG_DF],
    ["a simple reply", false, 0],
  ])("of more than 2 MiB is whole in %s", async (_what, structured, flags) => {
    const disk = new MemoryExport({ bytes: pattern(8 * MIB) });
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", structured);
    const [offset, length] = [777, 7 * MIB + 13];
    client.send(request(CMD_READ, 7, offset, length, flags));
    const expected = disk.bytes.subarray(offset, offset + length);
    const got = Buffer.alloc(length);
    if (structured) {
      for (let at = 0; at < length; ) {
        const chunk = await client.takeChunk();
        expect(chunk.readBigUInt64BE(20)).toBe(BigInt(offset + at));
        at += chunk.copy(got, at, 28);
        expect(chunk.readUInt16BE(4)).toBe(at === length ? DONE : 0);
        if (flags === CMD_FLAG_DF) expect(at).toBe(length);
      }
    } else {
      expect(await client.take(16)).toEqual(simpleReply(7));
      (await client.take(length)).copy(got);
    }
    expect(got.equals(expected)).toBe(true);
    expect(Math.max(...disk.reads.map((read) => read.length))).toBeLessThanOrEqual(2 * MIB);
  });

  it("reads holes like data behind the 64th run of a piece", async () => {
    const zeroes = Array.from({ length: 100 }, (_, index) => ({ offset: index * 1024, length: 512 }));
    const bytes = pattern(100 * KIB);
    for (const { offset, length } of zeroes) bytes.fill(0, offset, offset + length);
    await using served = await serve([new MemoryExport({ bytes, zeroes })]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 8, 0, bytes.length));
    const got = Buffer.alloc(bytes.length, 0xee);
    let chunks = 0;
    for (let at = 0; at < got.length; chunks++) {
      const chunk = await client.takeChunk();
      expect(chunk.readBigUInt64BE(20)).toBe(BigInt(at));
      const isHole = chunk.readUInt16BE(6) === 2;
      const end = isHole ? at + chunk.readUInt32BE(28) : at + chunk.length - 28;
      if (isHole) got.fill(0, at, end);
      else chunk.copy(got, at, 28);
      at = end;
    }
    expect(got.equals(bytes)).toBe(true);
    expect(chunks).toBeGreaterThan(60);
    expect(chunks).toBeLessThan(210);
  });

  it.each([
    ["beyond the end", request(CMD_READ, 9, 8191, 2)],
    ["far beyond 2^53", request(CMD_READ, 9, 0xffffffffffffff00n, 512)],
    ["of nothing", request(CMD_READ, 9, 0, 0)],
    ["with FUA", request(CMD_READ, 9, 0, 512, 1)],
    ["with an unknown flag", request(CMD_READ, 9, 0, 512, 0x8000)],
  ])("%s is EINVAL, and the next one is answered", async (_what, wrong) => {
    const disk = holed();
    await using served = await serve([disk]);
    for (const structured of [true, false]) {
      using client = await RawClient.open(served.path, "disk", structured);
      client.send(wrong, request(CMD_READ, 10, 0, 512));
      const replies = [await takeReply(client, structured), await takeReply(client, structured, 512)];
      const refused = replies.find((reply) => reply.cookie === 9n);
      expect(refused?.error).toBe(EINVAL);
      expect(replies.find((reply) => reply.cookie === 10n)?.error).toBe(0);
    }
    expect(served.errors).toEqual([]);
  });

  it("with DF but without chunks is EINVAL, as is one of more than 32 MiB", async () => {
    await using served = await serve([new MemoryExport({ bytes: Buffer.alloc(40 * MIB) })]);
    using client = await RawClient.open(served.path, "disk", false);
    client.send(request(CMD_READ, 1, 0, 512, CMD_FLAG_DF));
    expect(await client.take(16)).toEqual(simpleReply(1, EINVAL));
    client.send(request(CMD_READ, 2, 0, 32 * MIB + 1));
    expect(await client.take(16)).toEqual(simpleReply(2, EINVAL));
  });
});

/** The head of a reply; the data that follows it is dropped. */
async function takeReply(
  client: RawClient,
  structured: boolean,
  dataBytes = 0,
): Promise<{ cookie: bigint; error: number }> {
  if (structured) {
    const chunk = await client.takeChunk();
    const isError = (chunk.readUInt16BE(6) & 0x8000) !== 0;
    return { cookie: chunk.readBigUInt64BE(8), error: isError ? chunk.readUInt32BE(20) : 0 };
  }
  const head = await client.take(16);
  const error = head.readUInt32BE(4);
  if (error === 0) await client.take(dataBytes);
  return { cookie: head.readBigUInt64BE(8), error };
}

describe("BLOCK_STATUS", () => {
  it("tells holes that read as zeroes (3) from data (0)", async () => {
    await using served = await serve([holed()]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_BLOCK_STATUS, 1, 1001, 7000));
    expect(await client.takeChunk()).toEqual(
      statusChunk(1n, DONE, 1, [
        [1047, 0],
        [2048, 3],
        [3905, 0],
      ]),
    );
  });

  it("with REQ_ONE tells the first extent", async () => {
    await using served = await serve([holed()]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_BLOCK_STATUS, 2, 2049, 6000, CMD_FLAG_REQ_ONE));
    expect(await client.takeChunk()).toEqual(statusChunk(2n, DONE, 1, [[2047, 3]]));
  });

  it("with REQ_ONE tells the whole of it, though the export answers in steps", async () => {
    const disk = holed();
    disk.extents = async (offset) => [{ length: 512, isZero: offset < 2048 }];
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_BLOCK_STATUS, 4, 0, 8192, CMD_FLAG_REQ_ONE));
    expect(await client.takeChunk()).toEqual(statusChunk(4n, DONE, 1, [[2048, 3]]));
  });

  it("tells at most 4096 extents", async () => {
    const zeroes = Array.from({ length: 8192 }, (_, index) => ({ offset: index * 1024, length: 512 }));
    await using served = await serve([new MemoryExport({ bytes: Buffer.alloc(8 * MIB), zeroes })]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_BLOCK_STATUS, 3, 0, 8 * MIB));
    const pairs = Array.from({ length: 4096 }, (_, index): [number, number] => [512, index % 2 === 0 ? 3 : 0]);
    expect((await client.takeChunk()).equals(statusChunk(3n, DONE, 1, pairs))).toBe(true);
  });

  it.each([
    ["beyond the end", request(CMD_BLOCK_STATUS, 1, 8191, 2)],
    ["of nothing", request(CMD_BLOCK_STATUS, 1, 0, 0)],
    ["with an unknown flag", request(CMD_BLOCK_STATUS, 1, 0, 512, CMD_FLAG_DF)],
  ])("%s is EINVAL", async (_what, wrong) => {
    await using served = await serve([holed()]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(wrong);
    expect(await takeReply(client, true)).toEqual({ cookie: 1n, error: EINVAL });
  });

  it("is EINVAL where the context was not negotiated", async () => {
    await using served = await serve([holed()]);
    using client = await RawClient.open(served.path, "disk", false);
    client.send(request(CMD_BLOCK_STATUS, 1, 0, 512));
    expect(await client.take(16)).toEqual(simpleReply(1, EINVAL));
  });
});

describe("commands that change a disk", () => {
  it("are EPERM, and the payload of a WRITE is skipped", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_WRITE, 1, 0, 1500), Buffer.alloc(1500, 0x25), request(CMD_TRIM, 2, 0, 512));
    client.send(request(CMD_WRITE_ZEROES, 3, 0, 512));
    for (const cookie of [1n, 2n, 3n]) {
      expect(await client.takeChunk()).toEqual(errorChunk(cookie, DONE, EPERM, "the export is read-only"));
    }
    client.send(request(CMD_READ, 4, 0, 512));
    expect(await client.takeChunk()).toEqual(dataChunk(4n, DONE, 0, disk.bytes.subarray(0, 512)));
  });
});

describe("other commands", () => {
  it.each([
    ["FLUSH, which was not offered", 3],
    ["CACHE, which was not offered", 5],
    ["an unknown command", 4711],
  ])("are EINVAL: %s", async (_what, type) => {
    await using served = await serve([holed()]);
    using client = await RawClient.open(served.path, "disk", false);
    client.send(request(type, 1, 0, 0));
    expect(await client.take(16)).toEqual(simpleReply(1, EINVAL));
  });

  it("DISC ends the connection after the replies that are due", async () => {
    const disk = holed();
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", false);
    client.send(request(CMD_READ, 1, 0, 512), request(CMD_DISC, 2, 0, 0), request(CMD_READ, 3, 0, 512));
    expect(await client.take(16 + 512)).toEqual(Buffer.concat([simpleReply(1), disk.bytes.subarray(0, 512)]));
    await client.hungUp();
    expect(disk.reads).toHaveLength(1);
  });
});

describe("a read that fails", () => {
  it("is EIO with the reason, reported once, and the connection goes on", async () => {
    const bytes = pattern(8 * KIB);
    const disk = new MemoryExport({
      bytes,
      onRead: async ({ offset }) => {
        if (offset === 4096) throw new Error("cluster 1 is not what was written");
      },
    });
    await using served = await serve([disk]);
    using chunks = await RawClient.open(served.path, "disk", true);
    chunks.send(request(CMD_READ, 1, 4100, 600));
    expect(await chunks.takeChunk()).toEqual(errorChunk(1n, DONE, EIO, "cluster 1 is not what was written"));
    expect(served.errors).toEqual([
      {
        error: new Error("cluster 1 is not what was written"),
        where: { exportName: "disk", offset: 4096, length: 1024 },
      },
    ]);
    chunks.send(request(CMD_READ, 2, 0, 512));
    expect(await chunks.takeChunk()).toEqual(dataChunk(2n, DONE, 0, bytes.subarray(0, 512)));
    using simple = await RawClient.open(served.path, "disk", false);
    simple.send(request(CMD_READ, 3, 4096, 512));
    expect(await simple.take(16)).toEqual(simpleReply(3, EIO));
    simple.send(request(CMD_READ, 4, 0, 512));
    expect(await simple.take(16 + 512)).toEqual(Buffer.concat([simpleReply(4), bytes.subarray(0, 512)]));
  });

  it("in a later piece ends the reply in chunks with an error, and without them the connection", async () => {
    const disk = new MemoryExport({
      bytes: pattern(4 * MIB),
      onRead: async ({ offset }) => {
        if (offset >= 2 * MIB) throw new Error("no");
      },
    });
    await using served = await serve([disk]);
    using chunks = await RawClient.open(served.path, "disk", true);
    chunks.send(request(CMD_READ, 1, 0, 4 * MIB));
    expect((await chunks.takeChunk()).readUInt16BE(4)).toBe(0);
    expect(await chunks.takeChunk()).toEqual(errorChunk(1n, DONE, EIO, "no"));
    using simple = await RawClient.open(served.path, "disk", false);
    simple.send(request(CMD_READ, 1, 0, 4 * MIB));
    await simple.take(16 + 2 * MIB);
    await simple.hungUp();
    expect(served.errors).toHaveLength(2);
  });

  it("is answered when the other ranges of the request have settled: only then is their buffer free", async () => {
    let letGo: () => void = () => undefined;
    const disk = new MemoryExport({
      bytes: pattern(8 * KIB),
      zeroes: [{ offset: 2 * KIB, length: 2 * KIB }],
      onRead: async ({ offset }) => {
        if (offset === 0) throw new Error("no");
        await new Promise<void>((resolve) => {
          letGo = resolve;
        });
      },
    });
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 1, 0, 8192));
    const reply = client.takeChunk();
    expect(await Promise.race([reply, sleep(100, "waits")])).toBe("waits");
    letGo();
    expect(await reply).toEqual(errorChunk(1n, DONE, EIO, "no"));
  });

  it("is reported once though several of its ranges failed", async () => {
    const disk = new MemoryExport({
      bytes: pattern(8 * KIB),
      zeroes: [{ offset: 2 * KIB, length: 2 * KIB }],
      onRead: () => Promise.reject(new Error("no")),
    });
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 1, 0, 8192));
    expect(await client.takeChunk()).toEqual(errorChunk(1n, DONE, EIO, "no"));
    expect(served.errors.map(({ where }) => where)).toEqual([{ exportName: "disk", offset: 0, length: 2048 }]);
  });

  it("is EIO as well if the map of the range fails", async () => {
    const disk = holed();
    disk.extents = () => Promise.resolve([]);
    await using served = await serve([disk]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_BLOCK_STATUS, 1, 0, 512));
    expect(await takeReply(client, true)).toEqual({ cookie: 1n, error: EIO });
    client.send(request(CMD_READ, 2, 0, 512));
    expect(await takeReply(client, true)).toEqual({ cookie: 2n, error: EIO });
    expect(served.errors.map(({ where }) => where.length)).toEqual([512, 512]);
  });
});
