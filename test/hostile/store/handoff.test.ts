// SPDX-License-Identifier: AGPL-3.0-or-later
// Generated archivers: what comes over the connection from the container's user namespace.
import type { Socket } from "node:net";
import { PassThrough } from "node:stream";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  HandoffChannel,
  HandoffError,
  type HandoffMessage,
} from "../../../src/directory/container/container-handoff.ts";
import { formatCommit, parseCommit } from "../../../src/directory/container/container-messages.ts";
import { byteEdits, CASES, CASES_TIMEOUT_MS, editBytes, expectHostError, must, Tally } from "../cases.ts";
import { editJson, jsonEdits } from "../json-cases.ts";

const guestConfig = Buffer.from("name: x\n\xff", "latin1");
const SOUND: readonly object[] = [
  formatCommit({ summary: { files: 12, bytes: 4096, warnings: 1 }, guestConfig }),
  { token: "ab".repeat(32) },
  { log: ["info", "text"] },
];

/** All messages up to the end, and what reading threw. */
async function receive(pieces: readonly Buffer[]): Promise<{ messages: HandoffMessage[]; thrown: unknown }> {
  const stream = new PassThrough();
  using channel = new HandoffChannel(stream as unknown as Socket);
  for (const piece of pieces) stream.write(piece);
  stream.end();
  const messages: HandoffMessage[] = [];
  try {
    for (let one = await channel.next(); one !== undefined; one = await channel.next()) messages.push(one);
    return { messages, thrown: undefined };
  } catch (thrown) {
    return { messages, thrown };
  }
}

/** Objects, one a line, up to the first line that is none; an unfinished line is none yet. */
function readByHand(input: Buffer): { messages: unknown[]; isBroken: boolean } {
  const messages: unknown[] = [];
  for (const line of input.toString("latin1").split("\n").slice(0, -1)) {
    try {
      const value: unknown = JSON.parse(Buffer.from(line, "latin1").toString());
      if (Object.prototype.toString.call(value) !== "[object Object]") return { messages, isBroken: true };
      messages.push(value);
    } catch {
      return { messages, isBroken: true };
    }
  }
  return { messages, isBroken: false };
}

const isCount = (value: unknown): boolean =>
  typeof value === "number" && Number.isInteger(value) && value >= 0 && value < 2 ** 53;

describe("HandoffChannel and parseCommit()", () => {
  it(
    "take the messages that are whole and sound, however they come, and refuse the rest in one line",
    async () => {
      const tally = new Tally();
      const message = fc
        .tuple(fc.constantFrom(0, 0, 0, 1, 2), jsonEdits, fc.constantFrom("\n", "\n", "\n", "\n", "\r\n", "", "\n\n"))
        .map(([index, edits, end]) => editJson(SOUND[index], edits) + end);
      const lines = fc.array(message, { minLength: 1, maxLength: 3 });
      await fc.assert(
        fc.asyncProperty(lines, byteEdits, fc.nat(4), fc.nat(0xffff), async (list, edits, part, at) => {
          const text = Buffer.from(list.join(""));
          const input = part === 0 ? editBytes(text, edits) : text;
          const cut = at % (input.length + 1);
          const { messages, thrown } = await receive([input.subarray(0, cut), input.subarray(cut)]);
          const wanted = readByHand(input);
          must((thrown !== undefined) === wanted.isBroken, `broken: ${wanted.isBroken}, thrown: ${String(thrown)}`);
          must(JSON.stringify(messages) === JSON.stringify(wanted.messages), "the same messages");
          if (thrown !== undefined) must(expectHostError(thrown) instanceof HandoffError, "an error of the handoff");
          tally.add(thrown === undefined ? "intact" : "broken");
          for (const one of messages) {
            try {
              const { summary, guestConfig: config } = parseCommit(one);
              must([summary.files, summary.bytes, summary.warnings].every(isCount), "counts");
              must(config.length <= 4 * 2 ** 20, "a config of bounded length");
              tally.add("commit");
            } catch (error) {
              expectHostError(error);
              tally.add("no commit");
            }
          }
        }),
        { seed: 63, numRuns: CASES / 4 },
      );
      tally.expectAtLeast({ intact: 5000, broken: 3000, commit: 3000, "no commit": 5000 });
    },
    CASES_TIMEOUT_MS,
  );

  it("ends the talk at a line that never ends", async () => {
    const { messages, thrown } = await receive(Array.from({ length: 9 }, () => Buffer.alloc(2 ** 20, "x")));
    expect(messages).toEqual([]);
    expect(expectHostError(thrown).message).toMatch(/a message has more than 8388608 bytes/);
  });
});
