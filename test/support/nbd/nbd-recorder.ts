// SPDX-License-Identifier: AGPL-3.0-or-later
// Fake NBD servers that only listen and agree.
import { DONE, holeChunk, noneChunk } from "./nbd-bytes.ts";
import { talkTo } from "./nbd-client.ts";
import type { FakePeer, FakeRequest } from "./nbd-fake-server.ts";

/** The next requests, in the order of their arrival. */
export async function takeRequests(peer: FakePeer, count: number): Promise<FakeRequest[]> {
  const requests: FakeRequest[] = [];
  for (let index = 0; index < count; index++) requests.push(await peer.takeRequest());
  return requests;
}

/** A server that records the requests and says yes to each. */
export async function recorder(
  handshake = {},
): Promise<{ talk: Awaited<ReturnType<typeof talkTo>>; requests: FakeRequest[] }> {
  const requests: FakeRequest[] = [];
  const talk = await talkTo(async (peer) => {
    for (;;) {
      const request = await peer.takeRequest();
      requests.push(request);
      if (request.type === 1) await peer.take(request.length);
      peer.send(
        request.type === 0
          ? holeChunk(request.cookie, DONE, request.offset, request.length)
          : noneChunk(request.cookie),
      );
    }
  }, handshake);
  return { talk, requests };
}
