// SPDX-License-Identifier: AGPL-3.0-or-later
// One test per way a server can lie in the transmission phase.
import { describe, expect, it } from "vitest";
import {
  bytes,
  chunk,
  DONE,
  dataChunk,
  errorChunk,
  holeChunk,
  noneChunk,
  simpleReply,
  statusChunk,
  u16,
  u32,
  u64,
} from "../../support/nbd/nbd-bytes.ts";
import { failureOf, patience, talkTo } from "../../support/nbd/nbd-client.ts";
import type { FakePeer, FakeRequest } from "../../support/nbd/nbd-fake-server.ts";

const SIZE = 4096;
const OFFSET = 65_536;
const CONTEXTS = { "base:allocation": 5, "qemu:dirty-bitmap:a:b": 9 };

/** Sends `answer` to the first READ; answers how the read failed, and whether the connection survived. */
async function readAnswered(
  answer: (cookie: bigint) => Buffer,
  structured = true,
): Promise<{ name: string; message: string; isAlive: boolean }> {
  await using talk = await talkTo(
    async (peer) => {
      const request = await peer.takeRequest();
      peer.send(answer(request.cookie));
      await answerHonestly(peer, structured);
    },
    { structured },
  );
  const failure = await failureOf(talk.connection.read(OFFSET, Buffer.alloc(SIZE), patience()));
  return { ...failure, isAlive: await isAlive(talk.connection.trim(0, 512, patience())) };
}

async function statusAnswered(
  answer: (cookie: bigint) => Buffer,
): Promise<{ name: string; message: string; isAlive: boolean }> {
  await using talk = await talkTo(
    async (peer) => {
      const request = await peer.takeRequest();
      peer.send(answer(request.cookie));
      await answerHonestly(peer, true);
    },
    { contexts: CONTEXTS },
  );
  const failure = await failureOf(talk.connection.blockStatus(OFFSET, SIZE, patience()));
  return { ...failure, isAlive: await isAlive(talk.connection.trim(0, 512, patience())) };
}

async function answerHonestly(peer: FakePeer, structured: boolean): Promise<void> {
  const request: FakeRequest = await peer.takeRequest();
  peer.send(structured ? noneChunk(request.cookie) : simpleReply(request.cookie));
}

const isAlive = (next: Promise<void>): Promise<boolean> =>
  next.then(
    () => true,
    () => false,
  );

const data = (length: number): Buffer => Buffer.alloc(length, 0xaa);

describe("a broken frame kills the connection", () => {
  it.each<[string, (cookie: bigint) => Buffer, RegExp]>([
    ["a wrong magic", () => bytes("deadbeef", u32(0), u64(1), u32(0)), /magic is 0xdeadbeef/],
    ["a cookie nobody sent", (cookie) => noneChunk(cookie + 1n), /no command in flight has the cookie 2/],
    ["a cookie above 2^53", () => noneChunk(0xffff_ffff_ffff_ffffn), /cookie 18446744073709551615/],
    ["a simple reply with a cookie nobody sent", (cookie) => simpleReply(cookie + 7n), /has the cookie 8/],
    [
      "a chunk of 4 GiB",
      (cookie) => bytes("668e33ef", u16(1), u16(1), u64(cookie), u32(0xffffffff)),
      /4294967295 bytes/,
    ],
    ["a simple reply where structured ones were negotiated", (cookie) => simpleReply(cookie), /reply is simple/],
  ])("%s", async (_name, answer, message) => {
    const outcome = await readAnswered(answer);
    expect(outcome).toMatchObject({
      name: "NbdProtocolError",
      message: expect.stringMatching(message),
      isAlive: false,
    });
  });

  it("a structured reply that was not negotiated", async () => {
    const outcome = await readAnswered((cookie) => dataChunk(cookie, DONE, OFFSET, data(SIZE)), false);
    expect(outcome).toMatchObject({ name: "NbdProtocolError", message: expect.stringMatching(/not negotiated/) });
    expect(outcome.isAlive).toBe(false);
  });
});

describe("a chunk that is no answer kills the connection", () => {
  it.each<[string, (cookie: bigint) => Buffer, RegExp]>([
    ["an unknown type", (cookie) => chunk(cookie, 3, DONE, "00"), /chunk of type 3 does not answer/],
    ["block status for a read", (cookie) => statusChunk(cookie, DONE, 1, [[SIZE, 0]]), /type 5 does not answer/],
    ["an empty chunk with a payload", (cookie) => chunk(cookie, 0, DONE, "00"), /carries a payload/],
    ["an empty chunk that is not the last", (cookie) => chunk(cookie, 0, 0), /not the last one/],
    ["data before the request", (cookie) => dataChunk(cookie, DONE, OFFSET - 1, data(SIZE)), /outside the request/],
    ["data behind the request", (cookie) => dataChunk(cookie, DONE, OFFSET + 1, data(SIZE)), /outside the request/],
    ["data at 2^53", (cookie) => chunk(cookie, 1, DONE, `${u64(2n ** 53n)}00`), /not below 2\^53/],
    ["data without a byte", (cookie) => chunk(cookie, 1, DONE, u64(OFFSET)), /8 bytes, expected at least 9/],
    ["a hole outside", (cookie) => holeChunk(cookie, DONE, OFFSET, SIZE + 1), /outside the request/],
    ["a hole of no length", (cookie) => holeChunk(cookie, DONE, OFFSET, 0), /no length/],
    ["a hole of 13 bytes", (cookie) => chunk(cookie, 2, DONE, `${u64(OFFSET)}${u32(SIZE)}00`), /13 bytes, expected 12/],
    [
      "the same data twice",
      (cookie) => Buffer.concat([0, DONE].map((flags) => dataChunk(cookie, flags, OFFSET, data(SIZE)))),
      /repeats bytes/,
    ],
    [
      "a hole over data",
      (cookie) => Buffer.concat([dataChunk(cookie, 0, OFFSET, data(SIZE)), holeChunk(cookie, DONE, OFFSET + 512, 1)]),
      /repeats bytes/,
    ],
    ["an error text longer than its chunk", (cookie) => chunk(cookie, 0x8001, DONE, u32(5) + u16(1)), /at least 7/],
    [
      "an error chunk of 5 bytes",
      (cookie) => chunk(cookie, 0x8001, DONE, `${u32(5)}00`),
      /5 bytes, expected at least 6/,
    ],
    ["an error offset that is missing", (cookie) => chunk(cookie, 0x8002, DONE, u32(5) + u16(0)), /at least 14/],
    ["an error chunk of 1 MiB", (cookie) => chunk(cookie, 0x8001, DONE, "00".repeat(1 << 20)), /at most 16384/],
  ])("%s", async (_name, answer, message) => {
    const outcome = await readAnswered(answer);
    expect(outcome).toMatchObject({
      name: "NbdProtocolError",
      message: expect.stringMatching(message),
      isAlive: false,
    });
  });
});

describe("an error reply fails its command only", () => {
  it.each<[string, (cookie: bigint) => Buffer, RegExp]>([
    [
      "EINVAL",
      (cookie) => errorChunk(cookie, DONE, 22),
      /^Cannot read 4096 bytes at 65536: the NBD server answers EINVAL$/,
    ],
    ["ENOSPC with a text", (cookie) => errorChunk(cookie, DONE, 28, "no\nroom"), /answers ENOSPC: no room$/],
    ["a number without a name", (cookie) => errorChunk(cookie, DONE, 121), /answers ERRNO_121$/],
    [
      "an error at an offset",
      (cookie) => chunk(cookie, 0x8002, DONE, u32(5) + u16(0) + u64(OFFSET)),
      /EIO at offset 65536$/,
    ],
    ["an unknown kind of error", (cookie) => chunk(cookie, 0x8123, DONE, `${u32(12)}${u16(0)}ffff`), /ENOMEM$/],
    [
      "two errors, of which the first is told",
      (cookie) => Buffer.concat([errorChunk(cookie, 0, 1, "first"), errorChunk(cookie, DONE, 5, "second")]),
      /EPERM: first$/,
    ],
    [
      "an error behind half of the data",
      (cookie) => Buffer.concat([dataChunk(cookie, 0, OFFSET, data(512)), errorChunk(cookie, DONE, 5)]),
      /EIO$/,
    ],
    ["a simple reply with an error", (cookie) => simpleReply(cookie, 22), /EINVAL$/],
  ])("%s", async (_name, answer, message) => {
    const outcome = await readAnswered(answer);
    expect(outcome).toMatchObject({ name: "NbdServerError", message: expect.stringMatching(message), isAlive: true });
  });

  it("quotes no more than 300 characters of the server's text", async () => {
    const outcome = await readAnswered((cookie) => errorChunk(cookie, DONE, 5, "x".repeat(4096)));
    expect(outcome.message.length).toBeLessThan(400);
  });

  it("an error of a simple reply where nothing else was negotiated", async () => {
    const outcome = await readAnswered((cookie) => simpleReply(cookie, 5), false);
    expect(outcome).toMatchObject({ name: "NbdServerError", message: expect.stringMatching(/EIO$/), isAlive: true });
  });
});

describe("a reply that ends incomplete fails its command only", () => {
  it.each<[string, (cookie: bigint) => Buffer, RegExp]>([
    ["no data at all", (cookie) => noneChunk(cookie), /sent only 0 of 4096 bytes/],
    ["a byte too few", (cookie) => dataChunk(cookie, DONE, OFFSET, data(SIZE - 1)), /sent only 4095 of 4096 bytes/],
    [
      "a gap in the middle",
      (cookie) =>
        Buffer.concat([dataChunk(cookie, 0, OFFSET, data(512)), holeChunk(cookie, DONE, OFFSET + 1024, SIZE - 1024)]),
      /sent only 3584 of 4096 bytes/,
    ],
    ["an error without a number", (cookie) => errorChunk(cookie, DONE, 0), /error without a number/],
  ])("%s", async (_name, answer, message) => {
    const outcome = await readAnswered(answer);
    expect(outcome).toMatchObject({ name: "NbdProtocolError", message: expect.stringMatching(message), isAlive: true });
  });

  it("block status for one context of two", async () => {
    const outcome = await statusAnswered((cookie) => statusChunk(cookie, DONE, 5, [[SIZE, 0]]));
    expect(outcome).toMatchObject({ name: "NbdProtocolError", isAlive: true });
    expect(outcome.message).toMatch(/answered for 1 of 2 metadata contexts/);
  });
});

describe("a block status that lies kills the connection", () => {
  const first = (cookie: bigint): Buffer => statusChunk(cookie, 0, 5, [[SIZE, 0]]);
  it.each<[string, (cookie: bigint) => Buffer, RegExp]>([
    ["an extent of no length", (cookie) => statusChunk(cookie, DONE, 5, [[0, 0]]), /has no length/],
    [
      "no length behind a good extent",
      (cookie) =>
        statusChunk(cookie, DONE, 5, [
          [512, 0],
          [0, 1],
        ]),
      /extent at 66048 has no length/,
    ],
    [
      "an extent beyond the request",
      (cookie) =>
        statusChunk(cookie, DONE, 5, [
          [SIZE, 0],
          [1, 1],
        ]),
      /is beyond the request/,
    ],
    [
      "a context nobody asked for",
      (cookie) => statusChunk(cookie, DONE, 6, [[SIZE, 0]]),
      /context 6 was not negotiated/,
    ],
    [
      "a context answered twice",
      (cookie) => Buffer.concat([first(cookie), first(cookie)]),
      /context 5 is answered twice/,
    ],
    ["no extent", (cookie) => statusChunk(cookie, DONE, 5, []), /payload has 4 bytes/],
    ["half an extent", (cookie) => chunk(cookie, 5, DONE, u32(5) + u32(SIZE)), /payload has 8 bytes/],
    [
      "more than 2^20 extents",
      (cookie) => bytes("668e33ef", u16(1), u16(5), u64(cookie), u32(4 + 8 * (2 ** 20 + 1))),
      /1 to 1048576 extents/,
    ],
    ["data for a status", (cookie) => dataChunk(cookie, DONE, OFFSET, data(SIZE)), /type 1 does not answer/],
    ["a simple reply that says success", (cookie) => simpleReply(cookie), /carries no status/],
  ])("%s", async (_name, answer, message) => {
    const outcome = await statusAnswered(answer);
    expect(outcome).toMatchObject({
      name: "NbdProtocolError",
      message: expect.stringMatching(message),
      isAlive: false,
    });
  });
});

describe("what comes unasked kills the connection", () => {
  it("a second reply to one command", async () => {
    await using talk = await talkTo(async (peer) => {
      const { cookie } = await peer.takeRequest();
      peer.send(noneChunk(cookie), noneChunk(cookie));
    });
    await talk.connection.trim(0, 512, patience());
    await new Promise((resolve) => setTimeout(resolve, 50));
    const failure = await failureOf(talk.connection.trim(0, 512, patience()));
    expect(failure).toMatchObject({ name: "NbdProtocolError", message: expect.stringMatching(/no command in flight/) });
  });
});
