// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { DONE, dataChunk, errorChunk, holeChunk, simpleReply, statusChunk } from "../../support/nbd/nbd-bytes.ts";
import { failureOf, patience, talkTo } from "../../support/nbd/nbd-client.ts";
import { ALL_FLAGS, type FakeRequest } from "../../support/nbd/nbd-fake-server.ts";
import { recorder, takeRequests } from "../../support/nbd/nbd-recorder.ts";

const MIB = 1 << 20;

describe("NbdConnection.read()", () => {
  it("keeps many reads apart that are answered in reverse and in pieces", async () => {
    await using talk = await talkTo(async (peer) => {
      const requests = await takeRequests(peer, 3);
      for (const { cookie, offset } of requests.reverse()) {
        peer.send(dataChunk(cookie, 0, offset + 2, Buffer.from([offset + 2, offset + 3])));
      }
      for (const { cookie, offset } of requests) {
        peer.send(
          dataChunk(cookie, 0, offset, Buffer.from([offset, offset + 1])),
          holeChunk(cookie, DONE, offset + 4, 4),
        );
      }
    });
    const targets = [0, 8, 16].map(() => Buffer.alloc(8, 0xff));
    await Promise.all(targets.map((target, index) => talk.connection.read(index * 8, target, patience())));
    expect(targets.map((target) => [...target])).toEqual([
      [0, 1, 2, 3, 0, 0, 0, 0],
      [8, 9, 10, 11, 0, 0, 0, 0],
      [16, 17, 18, 19, 0, 0, 0, 0],
    ]);
  });

  it("fills a buffer over shared memory", async () => {
    await using talk = await talkTo(async (peer) => {
      const { cookie, length } = await peer.takeRequest();
      peer.send(dataChunk(cookie, DONE, 0, Buffer.alloc(length, 0x5a)));
    });
    const shared = new SharedArrayBuffer(MIB);
    await talk.connection.read(0, Buffer.from(shared, 4096, 8192), patience());
    const view = new Uint8Array(shared);
    expect([view[4095], view[4096], view[12_287], view[12_288]]).toEqual([0, 0x5a, 0x5a, 0]);
  });

  it("splits at the server's maximum, and says the first error when all parts have settled", async () => {
    let answered = 0;
    await using talk = await talkTo(
      async (peer) => {
        const requests = await takeRequests(peer, 3);
        expect(requests.map(({ offset, length }) => [offset, length])).toEqual([
          [512, 1024],
          [1536, 1024],
          [2560, 512],
        ]);
        peer.send(errorChunk(requests[1]?.cookie ?? 0n, DONE, 5));
        await new Promise((resolve) => setTimeout(resolve, 50));
        answered = 3;
        for (const index of [2, 0]) {
          const { cookie, offset, length } = requests[index] as FakeRequest;
          peer.send(holeChunk(cookie, DONE, offset, length));
        }
      },
      { blockSize: [512, 512, 1024] },
    );
    const failure = await failureOf(talk.connection.read(512, Buffer.alloc(2560), patience()));
    expect(failure.message).toBe("Cannot read 1024 bytes at 1536: the NBD server answers EIO");
    expect(answered).toBe(3);
  });

  it.each([
    [-512, 512, /has 1048576 bytes/],
    [0.5, 512, /has 1048576 bytes/],
    [MIB - 512, 1024, /Cannot read 1024 bytes at 1048064: the NBD export has 1048576 bytes/],
    [256, 512, /multiples of 512/],
    [0, 100, /multiples of 512/],
  ])("refuses offset %d, length %d without asking the server", async (offset, length, message) => {
    const { talk, requests } = await recorder({ blockSize: [512, 4096, MIB] });
    await using _ = talk;
    const failure = await failureOf(talk.connection.read(offset, Buffer.alloc(length), patience()));
    expect(failure).toMatchObject({ code: "INVALID_PARAMS", message: expect.stringMatching(message) });
    expect(requests).toEqual([]);
  });

  it("reads the unaligned tail of an export", async () => {
    const { talk, requests } = await recorder({ sizeBytes: 1000, blockSize: [512, 4096, MIB] });
    await using _ = talk;
    await talk.connection.read(512, Buffer.alloc(488), patience());
    expect(requests).toMatchObject([{ offset: 512, length: 488 }]);
  });

  it("asks nothing for an empty target", async () => {
    const { talk, requests } = await recorder();
    await using _ = talk;
    await talk.connection.read(0, Buffer.alloc(0), patience());
    expect(requests).toEqual([]);
  });
});

describe("NbdConnection.write()", () => {
  it("sends header and payload, split at the maximum", async () => {
    const payloads: Buffer[] = [];
    await using talk = await talkTo(
      async (peer) => {
        for (;;) {
          const request = await peer.takeRequest();
          payloads.push(Buffer.from(await peer.take(request.length)));
          peer.send(simpleReply(request.cookie)); // beside structured ones: allowed but for READ
        }
      },
      { blockSize: [1, 1, 3] },
    );
    await talk.connection.write(7, Buffer.from("abcde"), patience());
    expect(payloads.map(String)).toEqual(["abc", "de"]);
  });

  it("keeps the name of the server's refusal", async () => {
    await using talk = await talkTo(async (peer) => {
      const request = await peer.takeRequest();
      await peer.take(request.length);
      peer.send(simpleReply(request.cookie, 28));
    });
    const failure = await failureOf(talk.connection.write(0, Buffer.alloc(512), patience()));
    expect(failure).toMatchObject({ name: "NbdServerError", error: { errno: "ENOSPC" } });
  });
});

describe("commands without payload", () => {
  it("trim(), writeZeroes() and flush() send their types", async () => {
    const { talk, requests } = await recorder();
    await using _ = talk;
    await talk.connection.trim(512, 1024, patience());
    await talk.connection.writeZeroes(0, 512, patience());
    await talk.connection.flush(patience());
    expect(requests.map(({ type, offset, length }) => [type, offset, length])).toEqual([
      [4, 512, 1024],
      [6, 0, 512],
      [3, 0, 0],
    ]);
  });

  it("trim() splits at 1 GiB", async () => {
    const { talk, requests } = await recorder({ sizeBytes: 2 ** 42 });
    await using _ = talk;
    await talk.connection.trim(0, 2.5 * 2 ** 30, patience());
    expect(requests.map(({ offset, length }) => [offset, length])).toEqual([
      [0, 2 ** 30],
      [2 ** 30, 2 ** 30],
      [2 ** 31, 2 ** 29],
    ]);
  });

  it("are refused where the server does not offer them, or the export is read-only", async () => {
    await using plain = await talkTo(async () => undefined, { flags: 1 });
    await using readOnly = await talkTo(async () => undefined, { flags: ALL_FLAGS | 2 });
    const signal = patience();
    for (const act of [
      plain.connection.trim(0, 1, signal),
      plain.connection.writeZeroes(0, 1, signal),
      plain.connection.flush(signal),
    ]) {
      expect(await failureOf(act)).toMatchObject({
        code: "NOT_SUPPORTED",
        message: expect.stringMatching(/not offer/),
      });
    }
    for (const act of [
      readOnly.connection.write(0, Buffer.alloc(1), signal),
      readOnly.connection.trim(0, 1, signal),
      readOnly.connection.writeZeroes(0, 1, signal),
    ]) {
      expect(await failureOf(act)).toMatchObject({
        code: "NOT_SUPPORTED",
        message: expect.stringMatching(/read-only/),
      });
    }
  });
});

describe("NbdConnection.blockStatus()", () => {
  const contexts = { "base:allocation": 1, "qemu:dirty-bitmap:x": 2 };

  it("answers one list per context, clipped and joined, each of its own length", async () => {
    await using talk = await talkTo(
      async (peer) => {
        const { cookie, offset, length } = await peer.takeRequest();
        expect([offset, length]).toEqual([4096, 8192]);
        peer.send(
          statusChunk(cookie, 0, 2, [
            [512, 0],
            [512, 1],
          ]),
          statusChunk(cookie, DONE, 1, [
            [1024, 0],
            [1024, 0],
            [65536, 3],
          ]),
        );
      },
      { contexts },
    );
    expect(await talk.connection.blockStatus(4096, 8192, patience())).toEqual(
      new Map([
        [
          "base:allocation",
          [
            { offset: 4096, length: 2048, flags: 0 },
            { offset: 6144, length: 6144, flags: 3 },
          ],
        ],
        [
          "qemu:dirty-bitmap:x",
          [
            { offset: 4096, length: 512, flags: 0 },
            { offset: 4608, length: 512, flags: 1 },
          ],
        ],
      ]),
    );
  });

  it("asks in whole blocks and answers only what was asked", async () => {
    await using talk = await talkTo(
      async (peer) => {
        const { cookie, offset, length } = await peer.takeRequest();
        expect([offset, length]).toEqual([4096, 8192]);
        peer.send(
          statusChunk(cookie, DONE, 1, [
            [4096, 0],
            [4096, 3],
          ]),
        );
      },
      { contexts: { "base:allocation": 1 }, blockSize: [4096, 4096, MIB] },
    );
    expect((await talk.connection.blockStatus(5000, 4000, patience())).get("base:allocation")).toEqual([
      { offset: 5000, length: 3192, flags: 0 },
      { offset: 8192, length: 808, flags: 3 },
    ]);
  });

  it("asks for at most 1 GiB at once", async () => {
    await using talk = await talkTo(
      async (peer) => {
        const { cookie, length } = await peer.takeRequest();
        expect(length).toBe(2 ** 30);
        peer.send(statusChunk(cookie, DONE, 1, [[length, 3]]));
      },
      { contexts: { "base:allocation": 1 }, sizeBytes: 2 ** 40 },
    );
    expect((await talk.connection.blockStatus(0, 2 ** 40, patience())).get("base:allocation")).toEqual([
      { offset: 0, length: 2 ** 30, flags: 3 },
    ]);
  });

  it("refuses an empty range", async () => {
    await using talk = await talkTo(async () => undefined, { contexts });
    expect((await failureOf(talk.connection.blockStatus(0, 0, patience()))).code).toBe("INVALID_PARAMS");
  });
});
