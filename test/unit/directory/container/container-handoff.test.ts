// SPDX-License-Identifier: AGPL-3.0-or-later
// The socket between the two processes of a container's backup, against peers that lie.
import { existsSync } from "node:fs";
import { mkdtemp, readdir, rm, stat } from "node:fs/promises";
import { connect, type Socket } from "node:net";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { HandoffError, HandoffListener } from "../../../../src/directory/container/container-handoff.ts";
import { takeHandoff } from "../../../support/container/take-handoff.ts";

const never = new AbortController().signal;
const unexpected = (message: string): void => expect.unreachable(message);
let runDir: string;
let listener: HandoffListener;

beforeEach(async () => {
  runDir = await mkdtemp(path.join(os.tmpdir(), "handoff-"));
  listener = await HandoffListener.open(runDir, unexpected);
});

afterEach(async () => {
  await listener[Symbol.asyncDispose]();
  expect(await readdir(runDir)).toEqual([]);
  await rm(runDir, { recursive: true, force: true });
});

/** Connects and sends these bytes. */
async function rawPeer(bytes: string): Promise<Socket> {
  const socket = connect(listener.path);
  socket.on("error", () => undefined);
  await new Promise<void>((resolve) => socket.once("connect", resolve));
  socket.write(bytes);
  return socket;
}

describe("HandoffListener", () => {
  it("lets nobody but its own user reach the socket", async () => {
    expect((await stat(path.dirname(listener.path))).mode & 0o777).toBe(0o700);
  });

  it("accepts the one that knows the token, and is gone from the file system then", async () => {
    const accepted = listener.accept(never);
    using theirs = await takeHandoff(listener.path, listener.token);
    using ours = await accepted;
    expect(existsSync(listener.path)).toBe(false);
    ours.send({ ok: true });
    expect(await theirs.next()).toEqual({ ok: true });
    theirs.send({ commit: { "guest-config": "ä" } });
    expect(await ours.next()).toEqual({ commit: { "guest-config": "ä" } });
  });

  it("refuses a wrong token, no token, and one that is too short", async () => {
    for (const first of [{ token: "0".repeat(64) }, {}, { token: listener.token.slice(1) }]) {
      await using other = await HandoffListener.open(runDir, unexpected);
      const accepted = other.accept(never);
      accepted.catch(() => undefined);
      const token = "token" in first ? (first.token ?? "") : "";
      using _peer = await takeHandoff(other.path, token === listener.token.slice(1) ? other.token.slice(1) : token);
      await expect(accepted).rejects.toThrow(HandoffError);
    }
  });

  it("gives up when it is disposed before anybody came", async () => {
    const accepted = listener.accept(never);
    accepted.catch(() => undefined);
    await listener[Symbol.asyncDispose]();
    await expect(accepted).rejects.toThrow(/no process took over/);
  });
});

describe("HandoffListener.accept()", () => {
  it("does not wait for the token of a peer that says nothing, once it is cancelled", async () => {
    const cancel = new AbortController();
    const accepted = listener.accept(cancel.signal);
    accepted.catch(() => undefined);
    const silent = await rawPeer("");
    cancel.abort(new Error("enough"));
    await expect(accepted).rejects.toThrow("enough");
    silent.destroy();
  });
});

describe("HandoffChannel.next()", () => {
  async function afterToken(bytes: string): Promise<{ next: () => Promise<unknown>; end: () => void }> {
    const accepted = listener.accept(never);
    const socket = await rawPeer(`${JSON.stringify({ token: listener.token })}\n${bytes}`);
    const channel = await accepted;
    return { next: () => channel.next(), end: () => socket.destroy() };
  }

  it("reads two messages of one packet, and a message of several", async () => {
    const peer = await afterToken('{"a":1}\n{"b":2}\n');
    expect([await peer.next(), await peer.next()]).toEqual([{ a: 1 }, { b: 2 }]);
    peer.end();
    expect(await peer.next()).toBeUndefined();
  });

  it("ends without a message where the peer goes in the middle of one", async () => {
    const peer = await afterToken('{"commit":');
    peer.end();
    expect(await peer.next()).toBeUndefined();
  });

  it.each([
    ["no JSON", "commit\n", /did not send JSON/],
    ["no object", "[1]\n", /did not send an object/],
    ["null", "null\n", /did not send an object/],
    ["a line without end", "x".repeat(9 * 1024 * 1024), /more than 8388608 bytes/],
  ])("refuses %s", async (_name, bytes, problem) => {
    const peer = await afterToken(bytes);
    await expect(peer.next()).rejects.toThrow(problem);
    peer.end();
  });
});
