// SPDX-License-Identifier: AGPL-3.0-or-later
// Generated clients of the server: sound conversations with something wrong in them. Whatever comes, an answer that is
// right or a closed connection, within bounded memory, and the clients beside it notice nothing.
import { once } from "node:events";
import { connect } from "node:net";
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { SeededRandom, seededBytes } from "../../../fixtures/lab/index.ts";
import { NbdConnection } from "../../../src/nbd/index.ts";
import { type ChosenExport, serveHandshake } from "../../../src/nbd/server-options.ts";
import { feed } from "../../support/nbd/feed-receiver.ts";
import { MemoryExport } from "../../support/nbd/memory-export.ts";
import {
  bytes,
  CMD_BLOCK_STATUS,
  CMD_READ,
  CMD_WRITE,
  clientFlags,
  contextOption,
  EINVAL,
  EPERM,
  goOption,
  OPT_EXPORT_NAME,
  OPT_GO,
  OPT_INFO,
  OPT_LIST,
  OPT_LIST_META_CONTEXT,
  OPT_SET_META_CONTEXT,
  OPT_STRUCTURED_REPLY,
  option,
  request,
  text,
  u32,
} from "../../support/nbd/nbd-bytes.ts";
import { patience } from "../../support/nbd/nbd-client.ts";
import { RawClient, type Served, serve } from "../../support/nbd/serve-nbd.ts";
import { byteEdits, CASES, CASES_TIMEOUT_MS, editBytes, must, Tally } from "../cases.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
const SIZE = 256 * KIB;
/** What reads as zeroes: every fourth 8 KiB. */
const ZEROES = Array.from({ length: 8 }, (_, index) => ({ offset: index * 32 * KIB, length: 8 * KIB }));
const content = seededBytes("hostile", SIZE);
for (const { offset, length } of ZEROES) content.fill(0, offset, offset + length);
const isHole = (offset: number): boolean => offset % (32 * KIB) < 8 * KIB;

// --- Handshakes ------------------------------------------------------------------------------------------------

const exportName = fc.constantFrom("disk", "disk", "disk", "", "x".repeat(5000), "disk\0", "../disk");
const query = fc.constantFrom(
  "base:allocation",
  "base:allocation",
  "base:",
  "",
  "qemu:dirty-bitmap:x",
  "y".repeat(4097),
);
const anyOption = fc.oneof(
  fc.constantFrom(option(OPT_STRUCTURED_REPLY), option(OPT_STRUCTURED_REPLY), option(OPT_LIST)),
  fc
    .tuple(fc.constantFrom(OPT_GO, OPT_INFO, OPT_INFO), exportName, fc.array(fc.nat(5), { maxLength: 4 }))
    .map(([number, name, types]) => goOption(number, name, ...types)),
  fc
    .tuple(fc.constantFrom(OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT), exportName, fc.array(query, { maxLength: 3 }))
    .map(([number, name, queries]) => contextOption(number, name, ...queries)),
  exportName.map((name) => option(OPT_EXPORT_NAME, text(name))),
  fc
    .tuple(fc.nat(20), fc.uint8Array({ maxLength: 30 }))
    .map(([number, data]) => option(number, Buffer.from(data).toString("hex"))),
  fc
    .constantFrom(32 * KIB, 32 * KIB + 1, 0x7fffffff, 0xffffffff)
    .map((length) => bytes("49484156454f5054", u32(OPT_GO), u32(length))),
);
const soundOptions = [
  option(OPT_STRUCTURED_REPLY),
  contextOption(OPT_SET_META_CONTEXT, "disk", "base:allocation"),
  goOption(OPT_GO, "disk", 3),
];
const handshake = fc
  .tuple(
    fc.constantFrom(3, 3, 3, 3, 3, 1, 0, 2, 7, 0xffffffff),
    fc.oneof(fc.array(anyOption, { minLength: 1, maxLength: 6 }), fc.constant(soundOptions)),
    byteEdits,
  )
  .map(([flags, options, edits]) => editBytes(Buffer.concat([clientFlags(flags), ...options]), edits));

function outcomeOf({ result, isHungry }: { result?: ChosenExport | undefined; isHungry: boolean }): string {
  if (isHungry) return "waits for more";
  if (result === undefined) return "hung up on";
  return result.hasAllocation ? "open with map" : "open";
}

describe("serveHandshake()", () => {
  it(
    "answers, opens an export that exists, or hangs up, for any bytes",
    () => {
      const tally = new Tally();
      const disk = new MemoryExport({ bytes: content });
      const exports = new Map([[disk.name, disk]]);
      fc.assert(
        fc.property(handshake, (input) => {
          let sentBytes = 0;
          const fed = feed(
            serveHandshake((sent) => {
              sentBytes += sent.length;
            }, exports),
            input,
          );
          must(fed.thrown === undefined, "nothing is thrown");
          must(fed.largestBytes <= 32 * KIB, "memory is bounded");
          must(sentBytes <= 18 + 134 + input.length * 16, "an option of 16 bytes has an answer of few more");
          must(fed.result === undefined || fed.result.export === disk, "only what exists is opened");
          must(!fed.result?.hasAllocation || fed.result.hasStructuredReplies, "no map without structured replies");
          tally.add(outcomeOf(fed));
        }),
        { seed: 24, numRuns: CASES },
      );
      tally.expectAtLeast({ open: 5000, "open with map": 5000, "hung up on": 20_000, "waits for more": 10_000 });
    },
    CASES_TIMEOUT_MS,
  );
});

// --- Requests --------------------------------------------------------------------------------------------------

interface Asked {
  readonly bytes: Buffer;
  readonly type: number;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
}

/** One that gets an answer in every other case; the cookie is the place in the list. */
function anyRequest(random: SeededRandom, cookie: number): Asked {
  const isSound = random.next() < 0.5;
  const type = random.pick(
    isSound ? [CMD_READ, CMD_BLOCK_STATUS] : [CMD_READ, CMD_BLOCK_STATUS, CMD_WRITE, 3, 4, 5, 6, 99],
  );
  const someOffset = random.integer(0, SIZE);
  const someLength = random.integer(1, Math.min(9000, SIZE - someOffset) + 1);
  const offset = isSound ? someOffset : random.pick([0, 1, 511, someOffset, SIZE - 1, SIZE, 2 ** 52]);
  const length = isSound ? someLength : random.pick([1, 512, someLength, 0, SIZE, 33 * MIB, 0xffffffff]);
  const flags = random.pick(isSound ? [0, 0, type === CMD_READ ? 4 : 8] : [0, 0, 4, 8, 1, 0x8000]);
  const payloadBytes = type === CMD_WRITE ? length % 3000 : 0;
  const header = request(type, cookie, offset, type === CMD_WRITE ? payloadBytes : length, flags);
  return { bytes: Buffer.concat([header, Buffer.alloc(payloadBytes, 0x25)]), type, flags, offset, length };
}

/** The answer by hand: an error, or success. */
function expectedError({ type, flags, offset, length }: Asked): number {
  if ([CMD_WRITE, 4, 6].includes(type)) return EPERM;
  const isInside = length > 0 && offset + length <= SIZE;
  const allowed = type === CMD_READ ? [0, 4] : [0, 8];
  const isCommand = type === CMD_READ || type === CMD_BLOCK_STATUS;
  return isCommand && isInside && allowed.includes(flags) ? 0 : EINVAL;
}

/** Reads replies until every request has had its last chunk, and judges each of them. */
async function judge(client: RawClient, asked: readonly Asked[], tally: Tally): Promise<void> {
  const read = new Map<number, Buffer>();
  for (let left = asked.length; left > 0; ) {
    const chunk = await client.takeChunk();
    const cookie = Number(chunk.readBigUInt64BE(8));
    const one = asked[cookie] as Asked;
    const error = expectedError(one);
    const type = chunk.readUInt16BE(6);
    if (type === 0x8001) {
      must(chunk.readUInt32BE(20) === error, `the error is ${error}`);
      tally.add(`error ${error}`);
    } else if (type === 5) {
      judgeStatus(chunk, one);
      tally.add("status");
    } else {
      must(one.type === CMD_READ && error === 0, "only what may be read is");
      const bytes = read.get(cookie) ?? Buffer.alloc(one.length, 0xee);
      read.set(cookie, bytes);
      const at = Number(chunk.readBigUInt64BE(20)) - one.offset;
      if (type === 1) chunk.copy(bytes, at, 28);
      else bytes.fill(0, at, at + chunk.readUInt32BE(28));
    }
    if (chunk.readUInt16BE(4) === 0) continue;
    left--;
    const bytes = read.get(cookie);
    if (bytes === undefined) continue;
    must(bytes.equals(content.subarray(one.offset, one.offset + one.length)), "the bytes are those of the disk");
    tally.add("read");
  }
}

function judgeStatus(chunk: Buffer, { type, flags, offset, length }: Asked): void {
  must(type === CMD_BLOCK_STATUS, "only a question has a status");
  let at = offset;
  for (let entry = 24; entry < chunk.length; entry += 8) {
    const end = at + chunk.readUInt32BE(entry);
    const hole = chunk.readUInt32BE(entry + 4) === 3;
    must(end > at && end <= offset + length, "extents lie in the request");
    for (let probe = at; probe < end; probe++) must(isHole(probe) === hole, "holes are holes, data is data");
    at = end;
  }
  must(flags === 8 ? chunk.length === 32 : at === offset + length, "one extent, or all");
}

describe("NbdServer", () => {
  const LIMIT = 48 * MIB;
  let served: Served;
  let largestBytes = 0;
  let beforeBytes = 0;
  let isOver = false;
  let witness: Promise<number>;

  /** A sound client beside all others. */
  async function beWitness(): Promise<number> {
    await using connection = await NbdConnection.open({
      ...{ address: served.address, exportName: "disk", signal: patience() },
    });
    let rounds = 0;
    for (const target = Buffer.alloc(SIZE); !isOver; rounds++) {
      target.fill(0xee);
      await connection.read(0, target, patience());
      must(target.equals(content), "the witness reads the disk");
      largestBytes = Math.max(largestBytes, process.memoryUsage().arrayBuffers);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    return rounds;
  }

  beforeAll(async () => {
    served = await serve([new MemoryExport({ bytes: content, zeroes: ZEROES })], { bufferBytes: LIMIT });
    beforeBytes = process.memoryUsage().arrayBuffers;
    witness = beWitness();
  });
  afterAll(() => served[Symbol.asyncDispose]());

  it(
    "answers 60,000 well-formed requests rightly, sensible or not",
    async () => {
      const tally = new Tally();
      const random = new SeededRandom(25);
      for (let round = 0; round < 200; round++) {
        await Promise.all(
          [0, 1, 2].map(async () => {
            using client = await RawClient.open(served.path, "disk", true);
            const asked = Array.from({ length: 100 }, (_, cookie) => anyRequest(random, cookie));
            client.send(...asked.map((one) => one.bytes));
            await judge(client, asked, tally);
          }),
        );
      }
      tally.expectAtLeast({ read: 12_000, status: 12_000, [`error ${EPERM}`]: 8000, [`error ${EINVAL}`]: 12_000 });
    },
    CASES_TIMEOUT_MS,
  );

  it(
    "survives 60,000 requests in broken streams that end anywhere",
    async () => {
      const random = new SeededRandom(26);
      const edits = fc.sample(byteEdits, { seed: 27, numRuns: 1200 });
      const opening = Buffer.concat([
        ...[clientFlags(), option(OPT_STRUCTURED_REPLY)],
        contextOption(OPT_SET_META_CONTEXT, "disk", "base:allocation"),
        goOption(OPT_GO, "disk"),
      ]);
      let hungUp = 0;
      for (let at = 0; at < edits.length; at += 6) {
        await Promise.all(
          edits.slice(at, at + 6).map(async (edit) => {
            const asked = Array.from({ length: 50 }, (_, cookie) => anyRequest(random, cookie).bytes);
            const stream = editBytes(Buffer.concat(asked), edit);
            const socket = connect({ path: served.path });
            socket.on("error", () => undefined);
            const isReading = random.next() < 0.7; // the others never read a reply
            if (isReading) socket.resume();
            socket.write(opening);
            socket.write(stream);
            if (isReading && edit.length === 0) {
              socket.write(Buffer.alloc(28)); // a request without a magic: only the server can end this one
              await once(socket, "close");
              hungUp++;
              return;
            }
            await new Promise((resolve) => setTimeout(resolve, random.integer(0, 20)));
            socket.destroy();
            if (!socket.closed) await once(socket, "close");
          }),
        );
      }
      expect(hungUp).toBeGreaterThan(200);
      expect(served.errors).toEqual([]);
    },
    CASES_TIMEOUT_MS,
  );

  it(
    "hangs up on those who are too many, and takes others when they have left",
    async () => {
      for (let round = 0; round < 20; round++) {
        const sockets = Array.from({ length: 60 }, () => connect({ path: served.path }));
        for (const socket of sockets) socket.on("error", () => undefined);
        let refused = 0;
        for (const socket of sockets) socket.on("end", () => refused++).resume();
        while (refused < 60 - 16) await new Promise((resolve) => setTimeout(resolve, 5));
        for (const socket of sockets) socket.destroy();
        await Promise.all(sockets.map((socket) => (socket.closed ? undefined : once(socket, "close"))));
      }
    },
    CASES_TIMEOUT_MS,
  );

  it("served a sound client beside them all the time, within its memory", async () => {
    isOver = true;
    expect(await witness).toBeGreaterThan(200);
    // Besides replies there are requests, 64 KiB of each client, and this test's own bytes until they are collected.
    expect(largestBytes - beforeBytes).toBeLessThan(LIMIT + 96 * MIB);
    using client = await RawClient.open(served.path, "disk", true);
    const asked = [anyRequest(new SeededRandom(28), 0)];
    client.send(...asked.map((one) => one.bytes));
    await judge(client, asked, new Tally());
  });
});
