// SPDX-License-Identifier: AGPL-3.0-or-later
// Servers that stop in the middle: hang up, or say nothing more.
import { describe, expect, it } from "vitest";
import { DONE, dataChunk, holeChunk, noneChunk, statusChunk } from "../../support/nbd/nbd-bytes.ts";
import { failureOf, patience, talkTo } from "../../support/nbd/nbd-client.ts";

const SIZE = 600;
const DATA = Buffer.from(Array.from({ length: SIZE }, (_, index) => (index * 7 + 1) % 256));
/** A READ reply of three chunks: data, hole, data. */
const reply = (cookie: bigint): Buffer =>
  Buffer.concat([
    dataChunk(cookie, 0, 0, DATA.subarray(0, 100)),
    holeChunk(cookie, 0, 100, 50),
    dataChunk(cookie, DONE, 150, DATA.subarray(150)),
  ]);
const EXPECTED = Buffer.concat([DATA.subarray(0, 100), Buffer.alloc(50), DATA.subarray(150)]);

describe("a server that hangs up in a reply", () => {
  it("after any byte fails everything in flight with one and the same error", async () => {
    const length = reply(1n).length;
    for (let sentBytes = 0; sentBytes < length; sentBytes += sentBytes < 200 ? 1 : 37) {
      await using talk = await talkTo(async (peer) => {
        const { cookie } = await peer.takeRequest();
        await peer.takeRequest();
        await peer.takeRequest();
        peer.socket.end(reply(cookie).subarray(0, sentBytes));
      });
      const { connection } = talk;
      const outcomes = await Promise.all([
        failureOf(connection.read(0, Buffer.alloc(SIZE), patience())),
        failureOf(connection.read(4096, Buffer.alloc(SIZE), patience())),
        failureOf(connection.trim(0, 512, patience())),
      ]);
      expect(outcomes[0], `after ${sentBytes} bytes`).toMatchObject({ name: "NbdConnectionError" });
      expect(outcomes[0].message).toMatch(/^Cannot talk to NBD server at "unix:.*": it closed the connection$/);
      for (const { error } of outcomes) expect(error).toBe(outcomes[0].error);
      expect((await failureOf(connection.read(0, Buffer.alloc(1), patience()))).error).toBe(outcomes[0].error);
    }
  });
});

describe("a server that hangs up and reads nothing more", () => {
  it("fails a write at once that is still half in our hands", async () => {
    await using talk = await talkTo(async (peer) => {
      peer.socket.pause();
      peer.socket.end();
    });
    const failure = await failureOf(talk.connection.write(0, Buffer.alloc(1 << 20), patience()));
    // Because of the hang-up, and not of an answer that was waited for in vain.
    const errno = expect.stringMatching(/^(ECONNRESET|EPIPE)$/);
    expect(failure).toMatchObject({ name: "NbdConnectionError", error: { errno } });
  });
});

describe("a server that sends one byte at a time", () => {
  it("is understood", async () => {
    await using talk = await talkTo(
      async (peer) => {
        const { cookie } = await peer.takeRequest();
        await peer.sendSlowly(reply(cookie));
        const status = await peer.takeRequest();
        await peer.sendSlowly(
          statusChunk(status.cookie, DONE, 1, [
            [512, 0],
            [512, 3],
          ]),
        );
      },
      { contexts: { "base:allocation": 1 } },
    );
    const target = Buffer.alloc(SIZE, 0xff);
    await talk.connection.read(0, target, patience());
    expect(target).toEqual(EXPECTED);
    expect((await talk.connection.blockStatus(0, 4096, patience())).get("base:allocation")).toEqual([
      { offset: 0, length: 512, flags: 0 },
      { offset: 512, length: 512, flags: 3 },
    ]);
  });
});

describe("a server that says nothing", () => {
  const MESSAGE = /^NBD server at "unix:.*" did not answer for 0.15 s \(commands waiting: 2\)$/;
  it.each<[string, (cookie: bigint) => Buffer]>([
    ["at all", () => Buffer.alloc(0)],
    ["behind half a header", (cookie) => reply(cookie).subarray(0, 10)],
    ["behind half the data", (cookie) => reply(cookie).subarray(0, 60)],
    ["instead of the last chunk", (cookie) => dataChunk(cookie, 0, 0, DATA)],
  ])("%s is given up after replyTimeoutMs", async (_name, answer) => {
    await using talk = await talkTo(
      async (peer) => {
        peer.send(answer((await peer.takeRequest()).cookie));
      },
      {},
      { replyTimeoutMs: 150 },
    );
    const outcomes = await Promise.all([
      failureOf(talk.connection.read(0, Buffer.alloc(SIZE), patience())),
      failureOf(talk.connection.flush(patience())),
    ]);
    expect(outcomes[0]).toMatchObject({ name: "NbdConnectionError", message: expect.stringMatching(MESSAGE) });
    expect(outcomes[0]).toMatchObject({ error: { errno: "ETIMEDOUT" } });
    expect(outcomes[1].error).toBe(outcomes[0].error);
  });

  it("but sends a byte now and then is waited for", async () => {
    await using talk = await talkTo(
      async (peer) => {
        const answer = reply((await peer.takeRequest()).cookie);
        for (let part = 0; part < 8; part++) {
          peer.send(answer.subarray(part * 10, part * 10 + 10));
          await new Promise((resolve) => setTimeout(resolve, 50));
        }
        peer.send(answer.subarray(80));
      },
      {},
      { replyTimeoutMs: 150 },
    );
    const target = Buffer.alloc(SIZE);
    await talk.connection.read(0, target, patience());
    expect(target).toEqual(EXPECTED);
  });

  it("while nothing is asked of it is no fault, neither before nor after a command", async () => {
    await using talk = await talkTo(
      async (peer) => {
        for (;;) peer.send(noneChunk((await peer.takeRequest()).cookie));
      },
      {},
      { replyTimeoutMs: 60 },
    );
    for (let round = 0; round < 3; round++) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      await talk.connection.trim(0, 512, patience());
    }
  });

  it("is not blamed when this process was the one that slept", async () => {
    await using talk = await talkTo(
      async (peer) => {
        peer.send(noneChunk((await peer.takeRequest()).cookie));
        // The answer lies in the client's socket; stop the whole process beyond the timeout.
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 200);
      },
      {},
      { replyTimeoutMs: 60 },
    );
    await talk.connection.trim(0, 512, patience());
  });
});
