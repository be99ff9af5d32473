// SPDX-License-Identifier: AGPL-3.0-or-later
// Generated servers: sound conversations with something wrong in them. Whatever comes, an error of ours or
// a result that is right, and soon.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { HostError } from "../../../src/core/index.ts";
import { CommandTable, PendingCommand } from "../../../src/nbd/command.ts";
import { type Negotiated, negotiate } from "../../../src/nbd/handshake.ts";
import { NbdConnection } from "../../../src/nbd/index.ts";
import { receiveReplies } from "../../../src/nbd/replies.ts";
import { feed } from "../../support/nbd/feed-receiver.ts";
import {
  blockSizeInfo,
  bytes,
  chunk,
  contextReply,
  DONE,
  exportInfo,
  greeting,
  OPT_GO,
  OPT_SET_META_CONTEXT,
  OPT_STRUCTURED_REPLY,
  optionReply,
  REP_ACK,
  simpleReply,
  text,
  u32,
  u64,
} from "../../support/nbd/nbd-bytes.ts";
import { openNbd, patience } from "../../support/nbd/nbd-client.ts";
import { startFakeServer } from "../../support/nbd/nbd-fake-server.ts";
import { byteEdits, CASES, CASES_TIMEOUT_MS, editBytes, expectHostError, must, Tally } from "../cases.ts";

const MIB = 2 ** 20;
const REQUEST = { flags: 0, offset: 8, length: 16 };
const CONTEXTS = new Map([[1, "base:allocation"]]);

// --- Replies ---------------------------------------------------------------------------------------------------

interface Chunk {
  readonly type: number;
  readonly isDone: boolean;
  readonly cookie: number;
  readonly payload: Buffer;
}

const u32s = (...values: number[]): Buffer => bytes(...values.map(u32));

/** Mostly inside the request [8, 24), with neighbours of its ends. */
const place = fc.oneof({ weight: 4, arbitrary: fc.integer({ min: 8, max: 23 }) }, { weight: 1, arbitrary: fc.nat(40) });
const isDone = fc.boolean();
const dataChunk: fc.Arbitrary<Chunk> = fc
  .tuple(place, fc.integer({ min: 0, max: 17 }), isDone)
  .map(([at, count, done]) => ({
    ...{ type: 1, isDone: done, cookie: 1 },
    payload: Buffer.concat([u32s(0, at), Buffer.alloc(count, 0x40 + at)]),
  }));
const holeChunk: fc.Arbitrary<Chunk> = fc
  .tuple(place, fc.integer({ min: 0, max: 17 }), isDone)
  .map(([at, count, done]) => ({
    ...{ type: 2, isDone: done, cookie: 1 },
    payload: u32s(0, at, count),
  }));
/** The whole of the READ at once: without it few commands would ever succeed. */
const wholeChunk: fc.Arbitrary<Chunk> = fc.boolean().map((isHole) => ({
  ...{ type: isHole ? 2 : 1, isDone: true, cookie: 1 },
  payload: isHole ? u32s(0, 8, 16) : Buffer.concat([u32s(0, 8), Buffer.alloc(16, 0x48)]),
}));
const statusChunk: fc.Arbitrary<Chunk> = fc
  .tuple(
    fc.constantFrom(1, 1, 1, 2),
    fc.array(fc.tuple(fc.integer({ min: 0, max: 20 }), fc.nat(3)), { maxLength: 4 }),
    isDone,
  )
  .map(([id, extents, done]) => ({
    ...{ type: 5, isDone: done, cookie: 2 },
    payload: Buffer.concat([u32s(id), ...extents.map(([length, flags]) => u32s(length, flags))]),
  }));
const noneChunk: fc.Arbitrary<Chunk> = fc
  .tuple(fc.integer({ min: 1, max: 3 }), fc.constantFrom(true, true, false))
  .map(([cookie, done]) => ({ type: 0, isDone: done, cookie, payload: Buffer.alloc(0) }));
const errorChunk: fc.Arbitrary<Chunk> = fc
  .tuple(fc.integer({ min: 1, max: 3 }), fc.constantFrom(0, 5, 22, 28, 4711), fc.boolean(), isDone)
  .map(([cookie, errno, hasOffset, done]) => ({
    ...{ type: hasOffset ? 0x8002 : 0x8001, isDone: done, cookie },
    payload: Buffer.concat([u32s(errno), Buffer.from("\0\x03no\n"), hasOffset ? u32s(0, 8) : Buffer.alloc(0)]),
  }));
const oddChunk: fc.Arbitrary<Chunk> = fc.record({
  type: fc.constantFrom(0, 1, 2, 3, 5, 0x8001, 0x8003, 0xffff),
  isDone,
  cookie: fc.nat(4),
  payload: fc.uint8Array({ maxLength: 24 }).map((bytes) => Buffer.from(bytes)),
});
/** A simple reply: only the cookie counts. */
const anySimpleReply = fc
  .tuple(fc.integer({ min: 1, max: 3 }), fc.constantFrom(0, 0, 5))
  .map(([cookie, errno]) => ({ cookie, errno }));

type Message = Chunk | { readonly cookie: number; readonly errno: number };
const messages: fc.Arbitrary<Message[]> = fc.array(
  fc.oneof(wholeChunk, dataChunk, holeChunk, statusChunk, statusChunk, noneChunk, errorChunk, anySimpleReply, oddChunk),
  { minLength: 1, maxLength: 6 },
);

function wire(message: Message): Buffer {
  if ("errno" in message) return simpleReply(message.cookie, message.errno);
  const { type, isDone: done, cookie, payload } = message;
  return chunk(cookie, type, done ? DONE : 0, payload.toString("hex"));
}

function tableOfThree(): { commands: CommandTable; list: PendingCommand[]; target: Buffer } {
  const target = Buffer.alloc(16, 0xee);
  const list = [
    new PendingCommand({ ...REQUEST, type: 0, cookie: 1n }, true, target),
    new PendingCommand({ ...REQUEST, type: 7, cookie: 2n }, false),
    new PendingCommand({ ...REQUEST, type: 4, cookie: 3n }, false),
  ];
  const commands = new CommandTable();
  for (const command of list) commands.add(command);
  return { commands, list, target };
}

/** What a READ of [8, 24) must hold after these chunks; undefined where a byte is missing or comes twice. */
function bytesByHand(list: readonly Message[]): Buffer | undefined {
  const bytes = Buffer.alloc(16);
  const isFilled = new Array<boolean>(16).fill(false);
  for (const message of list) {
    if ("errno" in message || message.cookie !== 1) continue;
    const { type, payload } = message;
    if (type === 1 || type === 2) {
      const start = payload.readUInt32BE(4) - 8;
      const length = type === 1 ? payload.length - 8 : payload.readUInt32BE(8);
      for (let at = start; at < start + length; at++) {
        if (isFilled[at] !== false) return undefined;
        isFilled[at] = true;
        bytes[at] = type === 1 ? (payload[8 + at - start] as number) : 0;
      }
    }
    if (message.isDone) break;
  }
  return isFilled.every(Boolean) ? bytes : undefined;
}

describe("receiveReplies()", () => {
  it(
    "fails the connection or the command, or answers with what the server sent, for any reply",
    async () => {
      const tally = new Tally();
      await fc.assert(
        fc.asyncProperty(
          messages,
          byteEdits,
          fc.constantFrom(true, true, true, false),
          async (list, edits, isStructured) => {
            const { commands, list: pending, target } = tableOfThree();
            const session = { hasStructuredReplies: isStructured, contexts: CONTEXTS, commands };
            const input = editBytes(Buffer.concat(list.map(wire)), edits);
            const { thrown, largestBytes } = feed(receiveReplies(session), input);
            must(largestBytes <= 8 * MIB + 4, "memory is bounded by a block status of 2^20 extents");
            if (thrown !== undefined)
              must(expectHostError(thrown).name === "NbdProtocolError", "only lies end the connection");
            tally.add(thrown === undefined ? "connection lives" : "connection dies");
            const unanswered = commands.size;
            commands.abandonAll(undefined);
            const outcomes = await Promise.allSettled(pending.map((command) => command.done));
            let refused = 0;
            for (const [index, outcome] of outcomes.entries()) {
              if (outcome.status === "fulfilled") {
                tally.add(`command ${index + 1} succeeds`);
              } else if (outcome.reason !== undefined) {
                refused++;
                tally.add(expectHostError(outcome.reason).name);
              }
            }
            const succeeded = outcomes.filter(({ status }) => status === "fulfilled").length;
            must(refused + succeeded === 3 - unanswered, "every answered command is settled");
            if (outcomes[0]?.status === "fulfilled" && edits.length === 0) {
              // A simple reply carries its bytes unframed: what they are is the server's business.
              if (isStructured) must(bytesByHand(list)?.equals(target) === true, "the bytes are those that were sent");
            }
            if (outcomes[1]?.status === "fulfilled") {
              const extents = pending[1]?.statuses.get(1) ?? [];
              let end = REQUEST.offset;
              for (const extent of extents) {
                must(extent.offset === end && extent.length > 0, "extents follow each other");
                end += extent.length;
              }
              must(end > REQUEST.offset && end <= REQUEST.offset + REQUEST.length, "extents lie in the request");
            }
          },
        ),
        { seed: 21, numRuns: CASES },
      );
      tally.expectAtLeast({
        "command 1 succeeds": 5000,
        "command 2 succeeds": 1500,
        "command 3 succeeds": 3000,
        "connection lives": 8000,
        "connection dies": 30_000,
        NbdServerError: 5000,
        NbdProtocolError: 1000,
      });
    },
    CASES_TIMEOUT_MS,
  );
});

// --- Handshakes ------------------------------------------------------------------------------------------------

/** Mostly what an honest server says. */
const mostly = <T>(honest: fc.Arbitrary<T>, hostile: fc.Arbitrary<T>): fc.Arbitrary<T> =>
  fc.oneof({ weight: 5, arbitrary: honest }, { weight: 1, arbitrary: hostile });
const power = fc.constantFrom(0, 1, 3, 512, 4096, 65536, 65537, 131072, 32 * MIB, 0x80000000, 0xffffffff);
const anyExport = fc
  .tuple(
    mostly(fc.constantFrom(0n, 512n, 1n << 20n, (1n << 53n) - 1n), fc.constantFrom(1n << 53n, (1n << 64n) - 1n)),
    fc.nat(0xffff),
  )
  .map(([size, flags]) => exportInfo(size, flags));
const anyBlockSize = mostly<[number, number, number]>(
  fc.constantFrom([1, 4096, 32 * MIB], [512, 4096, 1_000_000], [65536, 65536, 0xffffffff], [1, 1, 1]),
  fc.tuple(power, power, power),
).map((sizes) => blockSizeInfo(...sizes));
const anyContext = mostly(
  fc.constantFrom<[number, string]>([1, "base:allocation"], [2, "qemu:dirty-bitmap:a:b"]),
  fc.tuple(fc.constantFrom(0, 1, 2), fc.constantFrom("base:allocation", "other", "")),
).map(([id, name]) => contextReply(OPT_SET_META_CONTEXT, id, name));

/** Informational replies to one option, sometimes one too many, then its end. */
function answer(option: number, informational: fc.Arbitrary<Buffer[]>): fc.Arbitrary<Buffer[]> {
  const ack = fc.constant(optionReply(option, REP_ACK));
  const error = fc
    .tuple(fc.constantFrom(1, 1, 2, 3, 6, 8, 9, 77), fc.constantFrom("", "no such\r\nthing", "x".repeat(500)))
    .map(([number, said]) => optionReply(option, 0x80000000 + number, text(said)));
  const odd = fc
    .tuple(fc.constantFrom(1, 2, 3, 4, 5, 0x7fffffff), fc.uint8Array({ maxLength: 20 }))
    .map(([type, data]) => optionReply(option, type, Buffer.from(data).toString("hex")));
  return fc
    .tuple(informational, mostly<Buffer[]>(fc.constant([]), fc.tuple(odd)), mostly(ack, error))
    .map(([list, extra, end]) => [...list, ...extra, end]);
}

const goReplies = fc
  .tuple(fc.option(anyExport, { freq: 10, nil: undefined }), fc.option(anyBlockSize, { nil: undefined }))
  .map((replies) => replies.filter((reply) => reply !== undefined));
const REPLY_TYPE_AT = 12;
/** A server that grants structured replies is asked for contexts, another one is not. */
const optionReplies: fc.Arbitrary<Buffer[]> = fc
  .tuple(
    answer(OPT_STRUCTURED_REPLY, fc.constant([])),
    answer(OPT_SET_META_CONTEXT, fc.array(anyContext, { maxLength: 2 })),
    answer(OPT_GO, goReplies),
  )
  .map(([structured, contexts, opened]) => {
    const isGranted = structured[0]?.readUInt32BE(REPLY_TYPE_AT) === REP_ACK;
    return [...structured, ...(isGranted ? contexts : []), ...opened];
  });

const anyGreeting = fc.constantFrom(3, 3, 3, 3, 3, 1, 2, 0xffff).map(greeting);
/** Size, flags and 124 zeroes: the answer to NBD_OPT_EXPORT_NAME, if it comes to that. */
const TAIL = Buffer.concat([bytes(u64(1n << 20n)), Buffer.alloc(2 + 124)]);

const WANTED = ["base:allocation", "qemu:dirty-bitmap:a:b"];

/** What must hold of every export that was opened, whatever the server said. */
function checkNegotiated({ sizeBytes, blockSize, contexts, hasStructuredReplies }: Negotiated): void {
  must(Number.isSafeInteger(sizeBytes) && sizeBytes >= 0, "the size is a number");
  const { minimum, preferred, maximum } = blockSize;
  must(Number.isInteger(Math.log2(minimum)) && minimum <= 65536, "the minimum is a power of two");
  must(preferred >= minimum && maximum >= minimum && maximum <= 32 * MIB, "block sizes are in order");
  must(maximum % minimum === 0, "the maximum is a multiple of the minimum");
  const names = [...contexts.values()];
  must(
    names.every((name) => WANTED.includes(name)),
    "only contexts that were asked for",
  );
  must(new Set(names).size === names.length && (hasStructuredReplies || names.length === 0), "each context once");
}

describe("negotiate()", () => {
  it(
    "throws nothing but errors of ours, and opens nothing but exports that make sense",
    () => {
      const tally = new Tally();
      fc.assert(
        fc.property(anyGreeting, optionReplies, byteEdits, (hello, replies, edits) => {
          const input = editBytes(Buffer.concat([hello, ...replies, TAIL]), edits);
          let sentBytes = 0;
          const send = (sent: Buffer): void => {
            sentBytes += sent.length;
          };
          const { result, thrown, largestBytes, isHungry } = feed(negotiate(send, "disk", WANTED), input);
          must(largestBytes <= 65536 && sentBytes < 1000, "memory and talk are bounded");
          if (thrown !== undefined) tally.add(expectHostError(thrown).name);
          else if (result !== undefined) checkNegotiated(result);
          if (result !== undefined) tally.add(result.contexts.size > 0 ? "open with contexts" : "open");
          if (isHungry) tally.add("waits for more");
        }),
        { seed: 22, numRuns: CASES },
      );
      tally.expectAtLeast({
        open: 5000,
        "open with contexts": 1000,
        "waits for more": 1000,
        NbdProtocolError: 20_000,
        NbdServerError: 2000,
        UnsupportedError: 2000,
      });
    },
    CASES_TIMEOUT_MS,
  );
});

describe("NbdConnection", () => {
  it("never hangs on a server that sends nonsense and hangs up", async () => {
    let input = Buffer.alloc(0);
    let isHonestFirst = false;
    await using server = await startFakeServer(async (peer) => {
      if (isHonestFirst) {
        await peer.handshake({ contexts: { "base:allocation": 1 } });
        await peer.takeRequest();
      }
      peer.socket.end(input);
    });
    const conversation = fc
      .tuple(messages, byteEdits)
      .map(([list, edits]) => editBytes(Buffer.concat(list.map(wire)), edits));
    await fc.assert(
      fc.asyncProperty(conversation, fc.boolean(), async (bytes, isHonest) => {
        input = Buffer.from(bytes);
        isHonestFirst = isHonest;
        const outcome = await openNbd(server, { metaContexts: ["base:allocation"] }).catch((thrown: unknown) => thrown);
        if (outcome instanceof NbdConnection) {
          const results = await Promise.allSettled([
            outcome.read(8, Buffer.alloc(16), patience()),
            outcome.blockStatus(8, 16, patience()),
            outcome.trim(8, 16, patience()),
          ]);
          for (const result of results) {
            if (result.status === "rejected") expect(result.reason).toBeInstanceOf(HostError);
          }
          await outcome[Symbol.asyncDispose]();
        } else {
          expect(outcome).toBeInstanceOf(HostError);
        }
      }),
      { seed: 23, numRuns: 2000 },
    );
  }, 180_000);
});
