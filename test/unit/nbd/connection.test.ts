// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it, onTestFinished, vi } from "vitest";
import {
  bytes,
  contextReply,
  exportInfo,
  greeting,
  OPT_EXPORT_NAME,
  OPT_SET_META_CONTEXT,
  optionReply,
  REP_ACK,
  REP_ERR_UNSUP,
  simpleReply,
  u16,
  u64,
} from "../../support/nbd/nbd-bytes.ts";
import { failureOf, openNbd, patience, talkTo } from "../../support/nbd/nbd-client.ts";
import { ALL_FLAGS, type FakeRequest, startFakeServer } from "../../support/nbd/nbd-fake-server.ts";

const MIB = 1 << 20;

describe("NbdConnection.open()", () => {
  it("tells what the server offers", async () => {
    await using talk = await talkTo(async () => undefined, {
      sizeBytes: 2 ** 44,
      flags: 0x01 | 0x02 | 0x20 | 0x100, // has flags, read-only, trim, multi-conn
      contexts: { "qemu:dirty-bitmap:a:b": 3 },
      blockSize: [512, 4096, MIB],
    });
    expect(talk.connection).toMatchObject({
      sizeBytes: 2 ** 44,
      isReadOnly: true,
      canTrim: true,
      canWriteZeroes: false,
      canFlush: false,
      canMultiConn: true,
      blockSize: { minimum: 512, preferred: 4096, maximum: MIB },
      metaContexts: ["qemu:dirty-bitmap:a:b"],
    });
  });

  it("sends the options in order, with several contexts, and asks for block sizes", async () => {
    const options: Array<[number, string]> = [];
    await using server = await startFakeServer(async (peer) => {
      peer.send(greeting());
      expect(await peer.take(4)).toEqual(bytes("00000003"));
      for (let index = 0; index < 3; index++) {
        const { option, data } = await peer.takeOption();
        options.push([option, data.toString("latin1")]);
        if (option === OPT_SET_META_CONTEXT) peer.send(contextReply(option, 0xffffffff, "b:c:d"));
        peer.send(option === 7 ? exportInfo(512, 1) : Buffer.alloc(0), optionReply(option, REP_ACK));
      }
    });
    const connection = await openNbd(server, { exportName: "é", metaContexts: ["a", "b:c:d", "a"] });
    expect(options).toEqual([
      [8, ""],
      [10, "\0\0\0\x02\xc3\xa9\0\0\0\x02\0\0\0\x01a\0\0\0\x05b:c:d"],
      [7, "\0\0\0\x02\xc3\xa9\0\x01\0\x03"],
    ]);
    expect(connection.metaContexts).toEqual(["b:c:d"]);
    await server[Symbol.asyncDispose]();
    await connection[Symbol.asyncDispose]();
  });

  it.each([
    [1, 124],
    [3, 0],
  ])("falls back to NBD_OPT_EXPORT_NAME; handshake flags %d, then %d zero bytes", async (flags, zeroes) => {
    await using server = await startFakeServer(async (peer) => {
      peer.send(greeting(flags));
      expect(await peer.take(4)).toEqual(bytes(`0000000${flags}`));
      for (;;) {
        const { option, data } = await peer.takeOption();
        if (option !== OPT_EXPORT_NAME) {
          peer.send(optionReply(option, REP_ERR_UNSUP));
          continue;
        }
        expect(data.toString()).toBe("disk");
        peer.send(bytes(u64(8192), u16(ALL_FLAGS)), Buffer.alloc(zeroes));
        const { cookie } = await peer.takeRequest();
        peer.send(simpleReply(cookie), Buffer.from("data"));
        return;
      }
    });
    const connection = await openNbd(server);
    expect(connection).toMatchObject({ sizeBytes: 8192, canTrim: true, blockSize: { minimum: 1, maximum: 32 * MIB } });
    const target = Buffer.alloc(4);
    await connection.read(0, target, patience());
    expect(target.toString()).toBe("data");
    await server[Symbol.asyncDispose]();
    await connection[Symbol.asyncDispose]();
  });

  it.each([
    [{ exportName: "x".repeat(4097) }, /4097 bytes, at most 4096/],
    [{ exportName: "a\0b" }, /NUL/],
    [{ metaContexts: ["x".repeat(4097)] }, /metadata context: it has 4097 bytes/],
  ])("refuses a name the protocol cannot carry", async (overrides, message) => {
    await using server = await startFakeServer(async () => undefined);
    expect(await failureOf(openNbd(server, overrides))).toMatchObject({
      code: "INVALID_PARAMS",
      message: expect.stringMatching(message),
    });
    expect(server.connections.size).toBe(0);
  });
});

describe("NbdConnection[Symbol.asyncDispose]()", () => {
  it("says DISC, once, and closes the socket", async () => {
    let farewell: FakeRequest | undefined;
    await using server = await startFakeServer(async (peer) => {
      await peer.handshake();
      farewell = await peer.takeRequest();
      peer.socket.end();
    });
    const connection = await openNbd(server);
    await Promise.all([connection[Symbol.asyncDispose](), connection[Symbol.asyncDispose]()]);
    expect(farewell).toMatchObject({ type: 2, offset: 0, length: 0 });
    await vi.waitFor(() => expect(server.connections.size).toBe(0));
    expect((await failureOf(connection.flush(patience()))).message).toMatch(/it was closed here/);
  });

  it("does not wait for ever for a server that keeps its end open", async () => {
    await using server = await startFakeServer(async (peer) => {
      peer.socket.allowHalfOpen = true;
      await peer.handshake();
    });
    const connection = await openNbd(server);
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    onTestFinished(() => void vi.useRealTimers());
    const closing = connection[Symbol.asyncDispose]();
    vi.advanceTimersByTime(4_000);
    await closing;
  });

  it("fails what is pending", async () => {
    await using talk = await talkTo(async () => undefined);
    const reading = talk.connection.read(0, Buffer.alloc(512), patience());
    const outcome = failureOf(reading);
    await talk.connection[Symbol.asyncDispose]();
    expect(await outcome).toMatchObject({ name: "NbdConnectionError", message: expect.stringMatching(/closed here/) });
  });
});
