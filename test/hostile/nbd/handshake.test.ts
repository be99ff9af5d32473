// SPDX-License-Identifier: AGPL-3.0-or-later
// One test per way a server can lie before the transmission phase.
import { describe, expect, it } from "vitest";
import { NbdConnection } from "../../../src/nbd/index.ts";
import {
  blockSizeInfo,
  bytes,
  contextReply,
  exportInfo,
  greeting,
  OPT_GO,
  OPT_SET_META_CONTEXT,
  OPT_STRUCTURED_REPLY,
  optionReply,
  REP_ACK,
  REP_ERR_UNKNOWN,
  REP_ERR_UNSUP,
  text,
  u16,
  u32,
  u64,
} from "../../support/nbd/nbd-bytes.ts";
import { failureOf, openNbd, patience } from "../../support/nbd/nbd-client.ts";
import { type FakePeer, startFakeServer } from "../../support/nbd/nbd-fake-server.ts";

const CONTEXT = "base:allocation";

/** Opens against a server that answers the given options so, and everything else honestly. */
async function openAnswered(answers: Readonly<Record<number, Buffer>>): Promise<{ name: string; message: string }> {
  await using server = await startFakeServer(async (peer) => {
    peer.send(greeting());
    await peer.take(4);
    for (;;) {
      const { option } = await peer.takeOption();
      peer.send(
        answers[option] ??
          Buffer.concat([exportInfo(4096, 1), optionReply(option, REP_ACK)].slice(option === OPT_GO ? 0 : 1)),
      );
    }
  });
  return await failureOf(openNbd(server, { metaContexts: [CONTEXT] }));
}

async function openGreeted(hello: Buffer): Promise<{ name: string; message: string }> {
  await using server = await startFakeServer(async (peer) => peer.send(hello));
  return await failureOf(openNbd(server));
}

describe("a greeting that is wrong", () => {
  it.each<[string, Buffer, string, RegExp]>([
    [
      "no NBD server",
      Buffer.from("SSH-2.0-OpenSSH_9.2p1 Debian\r\n"),
      "NbdProtocolError",
      /no NBD server listens there/,
    ],
    ["oldstyle", bytes("4e42444d41474943", "0000420281861253", "00".repeat(136)), "NbdProtocolError", /oldstyle/],
    ["an unknown second magic", bytes("4e42444d41474943", u64(1), u16(3)), "NbdProtocolError", /second magic is 0x1/],
    ["not fixed newstyle", greeting(0), "UnsupportedError", /fixed newstyle/],
  ])("%s", async (_name, hello, name, message) => {
    expect(await openGreeted(hello)).toMatchObject({ name, message: expect.stringMatching(message) });
  });
});

describe("an option reply that is wrong", () => {
  const ack = optionReply(OPT_GO, REP_ACK);
  it.each<[string, Record<number, Buffer>, RegExp]>([
    ["a wrong magic", { [OPT_STRUCTURED_REPLY]: Buffer.alloc(20) }, /option reply: magic is 0x0/],
    [
      "an answer to another option",
      { [OPT_STRUCTURED_REPLY]: optionReply(OPT_GO, REP_ACK) },
      /answers option 7, 8 was sent/,
    ],
    ["an unknown reply type", { [OPT_STRUCTURED_REPLY]: optionReply(8, 99) }, /type 99 does not answer/],
    [
      "a reply of 4 GiB",
      { [OPT_GO]: bytes("0003e889045565a9", u32(OPT_GO), u32(3), u32(0xffffffff)) },
      /4294967295 bytes, at most 65536/,
    ],
    ["no export information", { [OPT_GO]: ack }, /did not say its size/],
    ["information without a type", { [OPT_GO]: optionReply(OPT_GO, 3, "00") }, /it has no type/],
    ["export information cut short", { [OPT_GO]: optionReply(OPT_GO, 3, `0000${u64(4096)}`) }, /8 bytes, expected 10/],
    ["a size of 2^53", { [OPT_GO]: exportInfo(2n ** 53n, 1) }, /size 9007199254740992 is not below 2\^53/],
    ["a size of 2^64 - 1", { [OPT_GO]: exportInfo(2n ** 64n - 1n, 1) }, /size 18446744073709551615/],
    [
      "block sizes of zero",
      { [OPT_GO]: Buffer.concat([exportInfo(4096, 1), blockSizeInfo(0, 0, 0), ack]) },
      /0, 0, 0 make no sense/,
    ],
    ["a minimum of 3", { [OPT_GO]: blockSizeInfo(3, 4096, 65536) }, /make no sense/],
    ["a minimum of 2 GiB", { [OPT_GO]: blockSizeInfo(2 ** 31, 2 ** 31, 2 ** 31) }, /make no sense/],
    ["a maximum below the minimum", { [OPT_GO]: blockSizeInfo(4096, 4096, 512) }, /make no sense/],
    ["a preferred size below the minimum", { [OPT_GO]: blockSizeInfo(4096, 512, 65536) }, /make no sense/],
    ["block sizes cut short", { [OPT_GO]: optionReply(OPT_GO, 3, `0003${u32(1)}${u32(1)}`) }, /8 bytes, expected 12/],
    [
      "a context nobody asked for",
      { [OPT_SET_META_CONTEXT]: contextReply(OPT_SET_META_CONTEXT, 1, "other:thing") },
      /"other:thing" \(id 1\), which was not requested or is listed twice/,
    ],
    [
      "a context twice",
      {
        [OPT_SET_META_CONTEXT]: Buffer.concat([1, 2].map((id) => contextReply(OPT_SET_META_CONTEXT, id, CONTEXT))),
      },
      /was not requested or is listed twice/,
    ],
    [
      "a context without a name",
      { [OPT_SET_META_CONTEXT]: optionReply(OPT_SET_META_CONTEXT, 4, u32(1)) },
      /4 bytes, expected an id/,
    ],
    [
      "export information for the contexts",
      { [OPT_SET_META_CONTEXT]: optionReply(OPT_SET_META_CONTEXT, 3, "0000") },
      /type 3 does not answer/,
    ],
  ])("%s", async (_name, answers, message) => {
    expect(await openAnswered(answers)).toMatchObject({
      name: "NbdProtocolError",
      message: expect.stringMatching(message),
    });
  });

  it("endless replies to one option", async () => {
    const replies = Buffer.concat(new Array(1000).fill(optionReply(OPT_GO, 3, "00ff")));
    await using server = await startFakeServer(async (peer) => {
      peer.send(greeting());
      await peer.take(4);
      await peer.takeOption();
      peer.send(optionReply(OPT_STRUCTURED_REPLY, REP_ERR_UNSUP));
      await peer.takeOption();
      for (let batch = 0; batch < 70; batch++) peer.send(replies);
    });
    expect((await failureOf(openNbd(server))).message).toMatch(/more than 65536 replies/);
  });
});

describe("a refusal", () => {
  it.each<[number, string, RegExp]>([
    [0x80000002, "NBD_REP_ERR_POLICY", /policy forbids it/],
    [0x80000005, "NBD_REP_ERR_TLS_REQD", /requires TLS/],
    [
      REP_ERR_UNKNOWN,
      "NBD_REP_ERR_UNKNOWN",
      /^Cannot open NBD export "disk": the server has no such export \(it says: where\?\)$/,
    ],
    [0x80000007, "NBD_REP_ERR_SHUTDOWN", /shutting down/],
    [0x80001234, "NBD_REP_ERR_0x80001234", /refuses with error 0x80001234/],
  ])("0x%x of the export is a server error", async (type, errno, message) => {
    const outcome = await openAnswered({ [OPT_GO]: optionReply(OPT_GO, type, text("where?")) });
    expect(outcome).toMatchObject({
      name: "NbdServerError",
      message: expect.stringMatching(message),
      error: { errno },
    });
  });

  it("of the contexts leaves a connection without them", async () => {
    await using server = await startFakeServer(async (peer) => {
      peer.send(greeting());
      await peer.take(4);
      await peer.takeOption();
      peer.send(optionReply(OPT_STRUCTURED_REPLY, REP_ACK));
      await peer.takeOption();
      peer.send(contextReply(OPT_SET_META_CONTEXT, 1, CONTEXT), optionReply(OPT_SET_META_CONTEXT, REP_ERR_UNSUP));
      await peer.takeOption();
      peer.send(exportInfo(4096, 1), optionReply(OPT_GO, REP_ACK));
    });
    const connection = await openNbd(server, { metaContexts: [CONTEXT] });
    expect(connection.metaContexts).toEqual([]);
    expect((await failureOf(connection.blockStatus(0, 512, patience()))).message).toMatch(/no metadata context/);
    await server[Symbol.asyncDispose]();
    await connection[Symbol.asyncDispose]();
  });
});

describe("a server that hangs up", () => {
  it("after each byte of the handshake fails the opening", async () => {
    const handshake = Buffer.concat([
      greeting(),
      optionReply(OPT_STRUCTURED_REPLY, REP_ACK),
      exportInfo(4096, 1),
      optionReply(OPT_GO, REP_ACK),
    ]);
    // The client reads the handshake as a stream: what it sends meanwhile need not be looked at.
    let sentBytes = 0;
    await using server = await startFakeServer(async (peer: FakePeer) => {
      peer.socket.end(handshake.subarray(0, sentBytes));
    });
    for (; sentBytes < handshake.length; sentBytes++) {
      const outcome = await failureOf(openNbd(server));
      expect(outcome, `after ${sentBytes} bytes`).toMatchObject({ name: "NbdConnectionError" });
    }
  });
});

describe("a server that hangs", () => {
  it.each([0, 17, 18, 38, 57])("after %d bytes of the handshake meets the deadline", async (sentBytes) => {
    const handshake = Buffer.concat([greeting(), optionReply(OPT_STRUCTURED_REPLY, REP_ACK), exportInfo(4096, 1)]);
    await using server = await startFakeServer(async (peer) => {
      peer.send(handshake.subarray(0, sentBytes));
    });
    const outcome = await failureOf(openNbd(server, { connectTimeoutMs: 100 }));
    expect(outcome).toMatchObject({ name: "NbdConnectionError", error: { errno: "ETIMEDOUT" } });
    expect(outcome.message).toMatch(/the handshake did not end within 0.1 s/);
  });
  it("ends when the opening is aborted", async () => {
    await using server = await startFakeServer(async () => undefined);
    const controller = new AbortController();
    const opening = openNbd(server, { signal: controller.signal });
    setTimeout(() => controller.abort(new Error("enough")), 30);
    expect((await failureOf(opening)).message).toBe("enough");
  });
});

describe("an address where nobody is", () => {
  it.each([
    { transport: "unix", path: "/nonexistent/nbd.sock" } as const,
    { transport: "unix", path: `/tmp/${"x".repeat(200)}` } as const,
    { transport: "tcp", host: "127.0.0.1", port: 1 } as const,
  ])("$transport is a connection error that names the place", async (address) => {
    const outcome = await failureOf(NbdConnection.open({ address, exportName: "", signal: patience() }));
    expect(outcome.name).toBe("NbdConnectionError");
    expect(outcome.message).toMatch(
      /^Cannot connect to NBD server at "(unix|tcp):.*(ENOENT|EINVAL|ECONNREFUSED|ENAMETOOLONG)/,
    );
  });
  it("refuses an address that cannot be one", async () => {
    const address = { transport: "tcp", host: "", port: 0 } as const;
    expect((await failureOf(NbdConnection.open({ address, exportName: "", signal: patience() }))).code).toBe(
      "INVALID_PARAMS",
    );
  });
});
