// SPDX-License-Identifier: AGPL-3.0-or-later
// Random bytes from a server: whatever comes, an error of ours or a result, and soon.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { HostError } from "../../../src/core/index.ts";
import { CommandTable, PendingCommand } from "../../../src/nbd/command.ts";
import { negotiate } from "../../../src/nbd/handshake.ts";
import { NbdConnection } from "../../../src/nbd/index.ts";
import type { Receiver } from "../../../src/nbd/receiver.ts";
import { receiveReplies } from "../../../src/nbd/replies.ts";
import { greeting, optionReply } from "../../support/nbd-bytes.ts";
import { openNbd, patience } from "../../support/nbd-client.ts";
import { startFakeServer } from "../../support/nbd-fake-server.ts";

/** Feeds a receiver until it ends, throws or the bytes do; answers what it threw. */
function feed(receiver: Receiver<unknown>, input: Buffer): unknown {
  try {
    let at = 0;
    for (let step = receiver.next(); step.done !== true; step = receiver.next()) {
      if (at + step.value.length > input.length) return undefined;
      input.copy(step.value, 0, at, at + step.value.length);
      at += step.value.length;
    }
  } catch (error) {
    return error;
  }
  return undefined;
}

const byteString = (maxLength: number): fc.Arbitrary<Buffer> =>
  fc.uint8Array({ maxLength }).map((bytes) => Buffer.from(bytes));
const small = fc.integer({ min: 0, max: 40 });
const u16 = (value: number): number[] => [value >>> 8, value & 0xff];
const u32 = (value: number): number[] => [0, 0, ...u16(value)];

/** Chunks that look right on the outside: known magic, a cookie that may exist, a length that fits. */
const chunks = fc
  .array(
    fc.record({
      isSimple: fc.boolean(),
      type: fc.constantFrom(0, 1, 2, 5, 5, 0x8001, 0x8002, 3),
      flags: fc.constantFrom(0, 1),
      cookie: fc.integer({ min: 1, max: 4 }),
      payload: fc.oneof(
        byteString(40),
        fc.tuple(small, small).map(([offset, length]) => Buffer.from([0, 0, 0, 0, ...u32(offset), ...u32(length)])),
        fc
          .tuple(small, small, small)
          .map(([id, length, flags]) => Buffer.from([...u32(id % 3), ...u32(length), ...u32(flags)])),
      ),
    }),
    { maxLength: 6 },
  )
  .map((list) =>
    Buffer.concat(
      list.map(({ isSimple, type, flags, cookie, payload }) =>
        isSimple
          ? Buffer.from([0x67, 0x44, 0x66, 0x98, ...u32(0), 0, 0, 0, 0, ...u32(cookie)])
          : Buffer.concat([
              Buffer.from([
                0x66,
                0x8e,
                0x33,
                0xef,
                ...u16(flags),
                ...u16(type),
                0,
                0,
                0,
                0,
                ...u32(cookie),
                ...u32(payload.length),
              ]),
              payload,
            ]),
      ),
    ),
  );

function tableOfThree(): { commands: CommandTable; outcomes: Array<Promise<unknown>> } {
  const base = { flags: 0, offset: 8, length: 16 };
  const list = [
    new PendingCommand({ ...base, type: 0, cookie: 1n }, true, Buffer.alloc(16)),
    new PendingCommand({ ...base, type: 7, cookie: 2n }, false),
    new PendingCommand({ ...base, type: 4, cookie: 3n }, false),
  ];
  const commands = new CommandTable();
  for (const command of list) commands.add(command);
  return { commands, outcomes: list.map((command) => command.done.catch((error: unknown) => error)) };
}

describe("receiveReplies()", () => {
  it("throws nothing but protocol errors, and fails commands with nothing else but server errors", async () => {
    await fc.assert(
      fc.asyncProperty(fc.oneof(chunks, byteString(120)), fc.boolean(), async (input, hasStructuredReplies) => {
        const { commands, outcomes } = tableOfThree();
        const contexts = new Map([[1, "base:allocation"]]);
        const thrown = feed(receiveReplies({ hasStructuredReplies, contexts, commands }), input);
        if (thrown !== undefined) expect(thrown).toMatchObject({ code: "NBD_PROTOCOL" });
        commands.abandonAll(undefined);
        for (const outcome of await Promise.all(outcomes)) {
          if (outcome !== undefined)
            expect(outcome).toMatchObject({ code: expect.stringMatching(/^NBD_(PROTOCOL|SERVER)$/) });
        }
      }),
      { seed: 21, numRuns: 4000 },
    );
  });
});

describe("negotiate()", () => {
  it("throws nothing but errors of ours", () => {
    const replies = fc
      .array(
        fc.tuple(fc.constantFrom(8, 10, 7, 3), fc.constantFrom(1, 2, 3, 4, 0x80000001, 0x80000006), byteString(20)),
        {
          maxLength: 6,
        },
      )
      .map((list) =>
        Buffer.concat(list.map(([option, type, data]) => optionReply(option, type, data.toString("hex")))),
      );
    fc.assert(
      fc.property(fc.oneof(replies, byteString(100)), fc.boolean(), (input, isGreeted) => {
        const bytes = isGreeted ? Buffer.concat([greeting(), input]) : input;
        const thrown = feed(
          negotiate(() => undefined, "disk", ["base:allocation"]),
          bytes,
        );
        if (thrown !== undefined) expect(thrown).toBeInstanceOf(HostError);
      }),
      { seed: 22, numRuns: 4000 },
    );
  });
});

describe("NbdConnection", () => {
  it("never hangs on a server that sends random bytes and hangs up", async () => {
    let input = Buffer.alloc(0);
    let isHonestFirst = false;
    await using server = await startFakeServer(async (peer) => {
      if (isHonestFirst) {
        await peer.handshake({ contexts: { "base:allocation": 1 } });
        await peer.takeRequest();
      }
      peer.socket.end(input);
    });
    await fc.assert(
      fc.asyncProperty(fc.oneof(chunks, byteString(200)), fc.boolean(), async (bytes, isHonest) => {
        input = Buffer.from(bytes);
        isHonestFirst = isHonest;
        const startMs = performance.now();
        const outcome = await openNbd(server, { metaContexts: ["base:allocation"] }).catch((error: unknown) => error);
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
        expect(performance.now() - startMs).toBeLessThan(5000);
      }),
      { seed: 23, numRuns: 2000 },
    );
  });
});
