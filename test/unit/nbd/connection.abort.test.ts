// SPDX-License-Identifier: AGPL-3.0-or-later
import { getEventListeners } from "node:events";
import { describe, expect, it, vi } from "vitest";
import { DONE, dataChunk, errorChunk, noneChunk } from "../../support/nbd/nbd-bytes.ts";
import { failureOf, patience, talkTo } from "../../support/nbd/nbd-client.ts";
import { recorder, takeRequests } from "../../support/nbd/nbd-recorder.ts";

const MIB = 1 << 20;

describe("aborting", () => {
  it("a read in flight frees its buffer at once: what comes later goes nowhere", async () => {
    const controller = new AbortController();
    let finish: () => void = () => undefined;
    await using talk = await talkTo(async (peer) => {
      const { cookie } = await peer.takeRequest();
      const reply = dataChunk(cookie, DONE, 0, Buffer.alloc(MIB, 0x77));
      peer.send(reply.subarray(0, 1000));
      finish = () => peer.send(reply.subarray(1000));
    });
    const target = Buffer.alloc(MIB);
    const reading = talk.connection.read(0, target, controller.signal);
    const other = talk.connection.trim(0, 512, patience());
    await vi.waitFor(() => expect(target[0]).toBe(0x77));
    const reason = new Error("job cancelled");
    controller.abort(reason);
    target.fill(0);
    finish();
    expect((await failureOf(reading)).error).toBe(reason);
    expect(await failureOf(other)).toMatchObject({
      name: "NbdConnectionError",
      message: expect.stringMatching(/was cancelled/),
    });
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(target.equals(Buffer.alloc(MIB))).toBe(true);
  });

  it("gives every command of the signal its reason, and leaves no listener behind", async () => {
    const controller = new AbortController();
    await using talk = await talkTo(async () => undefined);
    const warnings: unknown[] = [];
    const note = (warning: unknown): void => void warnings.push(warning);
    process.on("warning", note);
    const reads = Array.from({ length: 30 }, (_, index) =>
      talk.connection.read(index * 512, Buffer.alloc(512), controller.signal),
    );
    expect(getEventListeners(controller.signal, "abort")).toHaveLength(1);
    const reason = new Error("enough");
    controller.abort(reason);
    for (const read of reads) expect((await failureOf(read)).error).toBe(reason);
    await new Promise((resolve) => setImmediate(resolve));
    process.off("warning", note);
    expect(warnings).toEqual([]);
    expect(getEventListeners(controller.signal, "abort")).toHaveLength(0);
  });

  it("a trim leaves the connection as it was", async () => {
    const controller = new AbortController();
    await using talk = await talkTo(async (peer) => {
      const [first, second] = await takeRequests(peer, 2);
      peer.send(noneChunk(first?.cookie ?? 0n), dataChunk(second?.cookie ?? 0n, DONE, 0, Buffer.from("ok")));
    });
    const trimming = talk.connection.trim(0, 512, controller.signal);
    controller.abort(new Error("never mind"));
    expect((await failureOf(trimming)).message).toBe("never mind");
    const target = Buffer.alloc(2);
    await talk.connection.read(0, target, patience());
    expect(target.toString()).toBe("ok");
  });

  it("before the start sends nothing, and kills nothing", async () => {
    const { talk, requests } = await recorder();
    await using _ = talk;
    expect(
      (await failureOf(talk.connection.read(0, Buffer.alloc(1), AbortSignal.abort(new Error("no"))))).message,
    ).toBe("no");
    await talk.connection.flush(patience());
    expect(requests).toHaveLength(1);
  });

  it("leaves no listener behind after success and after failure", async () => {
    const { signal } = new AbortController();
    await using talk = await talkTo(
      async (peer) => {
        peer.send(noneChunk((await peer.takeRequest()).cookie));
        peer.send(errorChunk((await peer.takeRequest()).cookie, DONE, 5));
      },
      {},
      { signal },
    );
    await talk.connection.flush(signal);
    await failureOf(talk.connection.flush(signal));
    expect(getEventListeners(signal, "abort")).toHaveLength(0);
  });
});
