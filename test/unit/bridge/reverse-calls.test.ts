// SPDX-License-Identifier: AGPL-3.0-or-later
import { PassThrough } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { createMessageConnection, type MessageConnection } from "vscode-jsonrpc/node.js";
import { ReverseCalls } from "../../../bridge/reverse-calls.ts";

const RANGES = [{ offset: 0, length: 512 }];

/** This side's calls, and the other side of the connection. */
function connect(): { calls: ReverseCalls; peer: MessageConnection; toUs: PassThrough } {
  const [toPeer, toUs] = [new PassThrough(), new PassThrough()];
  const ours = createMessageConnection(toUs, toPeer);
  const peer = createMessageConnection(toPeer, toUs);
  ours.listen();
  peer.listen();
  return { calls: new ReverseCalls(ours), peer, toUs };
}

describe("a reverse request", () => {
  it("ends with the abort's reason while the Perl side says nothing; a late answer harms nobody", async () => {
    const { calls, peer } = connect();
    const abort = new AbortController();
    const asked: string[] = [];
    let answer = (): void => undefined;
    peer.onRequest((method: string) => {
      asked.push(method);
      abort.abort(new Error("the job was stopped"));
      return new Promise((resolve) => {
        answer = () => resolve({ regions: [], done: true });
      });
    });
    await expect(calls.nextDirtyRegions("drive-scsi0", 8, 5_000, abort.signal)).rejects.toThrow("the job was stopped");
    expect(asked).toEqual(["next_dirty_regions"]);
    answer();
    await sleep(10); // an unhandled rejection would fail this file
  });

  it("ends with the abort's reason after the Perl side has gone without an answer", async () => {
    const { calls, peer, toUs } = connect();
    const abort = new AbortController();
    peer.onRequest(() => {
      toUs.end();
      toUs.once("end", () => abort.abort(new Error("the Perl side is gone")));
      return new Promise(() => undefined);
    });
    await expect(calls.deallocate("drive-scsi0", RANGES, abort.signal)).rejects.toThrow("the Perl side is gone");
  });

  it("gives what the Perl side answers, and says what it refused", async () => {
    const { calls, peer } = connect();
    peer.onRequest((method: string) => {
      if (method === "deallocate") throw new Error("no room");
      return { regions: [[4096, 512]], done: true };
    });
    const never = new AbortController().signal;
    expect(await calls.nextDirtyRegions("drive-scsi0", 8, 5_000, never)).toEqual({
      regions: [{ offset: 4096, length: 512 }],
      done: true,
    });
    await expect(calls.deallocate("drive-scsi0", RANGES, never)).rejects.toThrow(
      /^Cannot run "deallocate" on the Perl side: .*no room/,
    );
  });
});
