// SPDX-License-Identifier: AGPL-3.0-or-later
// Listening, limits, clients that leave or do not read, and the end of a server.
import { readdir, stat, writeFile } from "node:fs/promises";
import { connect } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { NbdServer } from "../../../src/nbd/index.ts";
import { MemoryExport } from "../../support/nbd/memory-export.ts";
import {
  CMD_READ,
  clientFlags,
  goOption,
  OPT_GO,
  OPT_LIST,
  option,
  request,
  simpleReply,
} from "../../support/nbd/nbd-bytes.ts";
import { failureOf } from "../../support/nbd/nbd-client.ts";
import { scratchFolder } from "../../support/nbd/nbd-servers.ts";
import { RawClient, serve } from "../../support/nbd/serve-nbd.ts";

const MIB = 2 ** 20;
const disk = (sizeBytes = 4096): MemoryExport => new MemoryExport({ bytes: Buffer.alloc(sizeBytes, 0x61) });
const onError = (): void => undefined;

/** Polls until it is so; the runner's timeout ends a test that waits in vain. */
async function until(isSo: () => boolean): Promise<void> {
  while (!isSo()) await sleep(5);
}

/** A read that goes on until its signal aborts or it is let go. */
function stuckReads(): { onRead: (range: unknown, signal: AbortSignal) => Promise<void>; letGo: () => void } {
  let letGo: () => void = () => undefined;
  const gate = new Promise<void>((resolve) => {
    letGo = resolve;
  });
  const onRead = async (_range: unknown, signal: AbortSignal): Promise<void> => {
    await Promise.race([
      gate,
      new Promise<never>((_, reject) => signal.addEventListener("abort", () => reject(signal.reason))),
    ]);
  };
  return { onRead, letGo };
}

describe("NbdServer.listen()", () => {
  it("makes a socket that only its owner can connect to, whatever the umask is, and nothing else", async () => {
    const umask = process.umask(0);
    try {
      await using folder = await scratchFolder();
      await using server = await NbdServer.listen({ path: folder.file("s"), exports: [disk()], onError });
      expect((await stat(server.path)).mode & 0o777).toBe(0o600);
      expect(await readdir(folder.path)).toEqual(["s"]);
    } finally {
      process.umask(umask);
    }
  });

  it("refuses a name that is taken, and leaves what is there", async () => {
    await using folder = await scratchFolder();
    await writeFile(folder.file("s"), "mine");
    const failure = await failureOf(NbdServer.listen({ path: folder.file("s"), exports: [disk()], onError }));
    expect(failure.code).toBe("ENVIRONMENT");
    expect(failure.message).toMatch(/^Cannot listen on NBD socket ".*\/s": it already exists \(EEXIST\)$/);
    expect(await readdir(folder.path)).toEqual(["s"]);
    expect((await stat(folder.file("s"))).size).toBe(4);
  });

  it("refuses a directory that does not exist", async () => {
    await using folder = await scratchFolder();
    const failure = await failureOf(NbdServer.listen({ path: folder.file("no/s"), exports: [], onError }));
    expect(failure.message).toMatch(/no such file or directory/);
  });

  it("refuses a path that no client could connect to", async () => {
    await using folder = await scratchFolder();
    const failure = await failureOf(NbdServer.listen({ path: folder.file("s".repeat(100)), exports: [], onError }));
    expect(failure.code).toBe("INVALID_PARAMS");
    expect(await readdir(folder.path)).toEqual([]);
  });

  it.each([
    ["a size that is no multiple of 512", [disk(1000)], {}, /its size 1000 is not a multiple of 512 bytes/],
    ["two exports of one name", [disk(), disk()], {}, /"disk": there are two of this name/],
    ["too little memory", [disk()], { connections: 4, bufferBytes: 8 * MIB }, /are too few for 4 connections/],
  ])("refuses %s", async (_what, exports, limits, message) => {
    await using folder = await scratchFolder();
    const failure = await failureOf(NbdServer.listen({ path: folder.file("s"), exports, onError, limits }));
    expect(failure.code).toBe("INVALID_PARAMS");
    expect(failure.message).toMatch(message);
  });
});

describe("a client", () => {
  it("is hung up on if it does not end its handshake in time; one that did is not", async () => {
    await using served = await serve([disk()], { handshakeTimeoutMs: 300 });
    using open = await RawClient.open(served.path, "disk", false);
    using slow = await RawClient.connect(served.path);
    slow.send(clientFlags(), option(OPT_LIST));
    await slow.hungUp();
    await sleep(300);
    open.send(request(CMD_READ, 1, 0, 1));
    expect(await open.take(17)).toEqual(Buffer.concat([simpleReply(1), Buffer.from("a")]));
  });

  it("is hung up on if there are too many; later there is room again", async () => {
    await using served = await serve([disk()], { connections: 2 });
    const first = await RawClient.open(served.path, "disk", false);
    using _second = await RawClient.open(served.path, "disk", false);
    using third = await RawClient.connect(served.path);
    await third.hungUp();
    first[Symbol.dispose]();
    for (;;) {
      using again = await RawClient.connect(served.path);
      const greeting = await again.take(18).catch(() => undefined);
      if (greeting !== undefined) break;
      await sleep(10);
    }
  });

  it("that sends byte by byte is served", async () => {
    await using served = await serve([disk()]);
    using client = await RawClient.connect(served.path);
    for (const byte of Buffer.concat([clientFlags(), goOption(OPT_GO, "disk"), request(CMD_READ, 9, 0, 2)])) {
      client.send(Buffer.of(byte));
      await new Promise((resolve) => setImmediate(resolve));
    }
    const replies = await client.take(18 + (20 + 12) + 20 + 16 + 2);
    expect(replies.subarray(-18)).toEqual(Buffer.concat([simpleReply(9), Buffer.from("aa")]));
  });

  it("gets an answer that is ready before an earlier one", async () => {
    const { letGo, onRead } = stuckReads();
    const slowFirst = new MemoryExport({
      bytes: Buffer.alloc(4096, 0x61),
      onRead: (range, signal) => (range.offset === 0 ? onRead(range, signal) : Promise.resolve()),
    });
    await using served = await serve([slowFirst]);
    using client = await RawClient.open(served.path, "disk", false);
    client.send(request(CMD_READ, 1, 0, 1), request(CMD_READ, 2, 512, 1));
    expect((await client.take(17)).readBigUInt64BE(8)).toBe(2n);
    letGo();
    expect((await client.take(17)).readBigUInt64BE(8)).toBe(1n);
  });

  it("that vanishes aborts its reads, and no error is reported", async () => {
    const stuck = new MemoryExport({ bytes: Buffer.alloc(MIB), onRead: stuckReads().onRead });
    await using served = await serve([stuck]);
    const client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 1, 0, MIB), request(CMD_READ, 2, 0, MIB));
    await until(() => stuck.pending === 2);
    client[Symbol.dispose]();
    await until(() => stuck.pending === 0);
    expect(served.errors).toEqual([]);
  });

  it("has no more requests in flight than allowed, and gets all answers in the end", async () => {
    const { letGo, onRead } = stuckReads();
    const stuck = new MemoryExport({ bytes: Buffer.alloc(4096), onRead });
    await using served = await serve([stuck], { requestsPerConnection: 3 });
    using client = await RawClient.open(served.path, "disk", false);
    for (let cookie = 1; cookie <= 20; cookie++) client.send(request(CMD_READ, cookie, 0, 512));
    await until(() => stuck.pending === 3);
    await sleep(50);
    expect(stuck.pending).toBe(3);
    letGo();
    const cookies = new Set<bigint>();
    for (let left = 20; left > 0; left--) cookies.add((await client.take(16 + 512)).readBigUInt64BE(8));
    expect(cookies.size).toBe(20);
  });

  it("that does not read its replies does not keep other clients waiting, and its share of memory is bounded", async () => {
    const big = disk(2 * MIB);
    await using served = await serve([big], { connections: 3, bufferBytes: 16 * MIB });
    const mute = [0, 1].map(() => connect({ path: served.path }));
    for (const socket of mute) {
      socket.pause();
      socket.on("error", () => undefined);
      socket.write(Buffer.concat([clientFlags(), goOption(OPT_GO, "disk")]));
      for (let cookie = 1; cookie <= 100; cookie++) socket.write(request(CMD_READ, cookie, 0, 2 * MIB));
    }
    await until(() => big.reads.length >= 2);
    await sleep(100);
    expect(big.reads.length).toBeLessThanOrEqual(8);
    using client = await RawClient.open(served.path, "disk", false);
    for (let cookie = 1; cookie <= 8; cookie++) client.send(request(CMD_READ, cookie, 0, 2 * MIB));
    for (let left = 8; left > 0; left--) {
      expect((await client.take(16 + 2 * MIB)).subarray(16).equals(big.bytes)).toBe(true);
    }
    for (const socket of mute) socket.destroy();
  });

  it.each([
    ["requests that are wrong", [clientFlags(), goOption(OPT_GO, "disk")], request(99, 1, 0, 0)],
    ["options", [clientFlags()], option(OPT_LIST)],
  ])("that sends %s and does not read the answers is not read from either", async (_what, opening, message) => {
    await using served = await serve([disk()]);
    const mute = connect({ path: served.path });
    mute.pause();
    mute.on("error", () => undefined);
    mute.write(Buffer.concat(opening));
    const flood = Buffer.concat(new Array<Buffer>(10_000).fill(message));
    let sentBytes = 0;
    const sendMore = (): void => {
      mute.write(flood, () => {
        sentBytes += flood.length;
        if (sentBytes < 100 * flood.length && !mute.destroyed) sendMore();
      });
    };
    sendMore();
    let before = -1;
    while (sentBytes > before) {
      before = sentBytes;
      await sleep(1000);
    }
    expect(sentBytes).toBeLessThan(100 * flood.length);
    using client = await RawClient.open(served.path, "disk", false);
    client.send(request(CMD_READ, 1, 0, 1));
    expect(await client.take(17)).toEqual(Buffer.concat([simpleReply(1), Buffer.from("a")]));
    mute.destroy();
  });

  it.each([
    ["a request with a wrong magic", Buffer.alloc(28)],
    ["a WRITE of more than 32 MiB", request(1, 1, 0, 32 * MIB + 1)],
  ])("is hung up on at once after %s, whatever it still waits for", async (_what, wrong) => {
    const stuck = new MemoryExport({ bytes: Buffer.alloc(4096), onRead: stuckReads().onRead });
    await using served = await serve([stuck]);
    using client = await RawClient.open(served.path, "disk", true);
    client.send(request(CMD_READ, 1, 0, 512), wrong);
    await client.hungUp();
  });
});

describe("dispose", () => {
  it("aborts the reads in flight, waits for them, hangs up and removes the socket", async () => {
    let settle: () => void = () => undefined;
    const slowToSettle = new MemoryExport({
      bytes: Buffer.alloc(4096),
      onRead: async (_range, signal) => {
        await new Promise((resolve) => signal.addEventListener("abort", resolve));
        await new Promise<void>((resolve) => {
          settle = resolve;
        });
        signal.throwIfAborted();
      },
    });
    await using folder = await scratchFolder();
    const errors: unknown[] = [];
    const options = {
      path: folder.file("s"),
      exports: [slowToSettle],
      onError: (error: unknown) => errors.push(error),
    };
    const server = await NbdServer.listen(options);
    using client = await RawClient.open(server.path, "disk", true);
    client.send(request(CMD_READ, 1, 0, 512));
    await until(() => slowToSettle.pending === 1);
    let isDisposed = false;
    const disposed = server[Symbol.asyncDispose]().then(() => {
      isDisposed = true;
    });
    await client.hungUp();
    await sleep(50);
    expect(isDisposed).toBe(false);
    settle();
    await disposed;
    expect(slowToSettle.pending).toBe(0);
    expect(errors).toEqual([]);
    expect(await readdir(folder.path)).toEqual([]);
    await server[Symbol.asyncDispose]();
  });

  it("ends clients in every state: in the handshake, idle, waiting for memory, not reading", async () => {
    const { onRead } = stuckReads();
    const stuck = new MemoryExport({ name: "stuck", bytes: Buffer.alloc(4 * MIB), onRead });
    const fast = disk(2 * MIB);
    const served = await serve([stuck, fast], { connections: 4, bufferBytes: 10 * MIB });
    const clients = [
      await RawClient.connect(served.path),
      await RawClient.open(served.path, "disk", true),
      await RawClient.open(served.path, "stuck", true),
      await RawClient.open(served.path, "disk", false),
    ];
    for (let cookie = 1; cookie <= 10; cookie++) clients[2]?.send(request(CMD_READ, cookie, 0, 2 * MIB));
    clients[3]?.socket.pause();
    for (let cookie = 1; cookie <= 10; cookie++) clients[3]?.send(request(CMD_READ, cookie, 0, 2 * MIB));
    await until(() => stuck.pending > 0 && fast.reads.length > 0);
    await served[Symbol.asyncDispose]();
    expect(stuck.pending).toBe(0);
    for (const client of clients) client[Symbol.dispose]();
  });
});
