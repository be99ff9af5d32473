// SPDX-License-Identifier: AGPL-3.0-or-later
// What a server may say of a disk, and what of it may be believed. The server is a script.
import { describe, expect, it } from "vitest";
import type { SourceExtent } from "../../../src/block/index.ts";
import type { VmVolume } from "../../../src/provider/index.ts";
import { NbdSource } from "../../../src/source/nbd-source.ts";
import { DONE, dataChunk, errorChunk, noneChunk, statusChunk } from "../../support/nbd/nbd-bytes.ts";
import {
  type FakePeer,
  type FakeRequest,
  type FakeServer,
  startFakeServer,
} from "../../support/nbd/nbd-fake-server.ts";
import { never, refusalOf } from "../../support/vm/vm-rules.ts";

const KIB = 1024;
const SIZE = 1024 * KIB;
const BITMAP = "snapshot-access:bk";
const DEVICE = "drive-scsi0";
const HOLE = 1;
const ZERO = 2;
const EINVAL = 22;
const TIMEOUTS = { connectTimeoutMs: 2000, replyTimeoutMs: 2000 };

/** Length and flags of extents from the asked offset on; "error" and "nothing" are answers too. */
type Status = Array<[number, number]> | "error" | "nothing";

interface Script {
  readonly sizeBytes?: number;
  readonly allocation?: (request: FakeRequest) => Status;
  readonly dirty?: (request: FakeRequest) => Status;
  readonly offersBitmap?: boolean;
  readonly content?: Buffer;
  readonly requests?: FakeRequest[];
}

/** The first connection is asked for base:allocation, the second for the bitmap. */
function startExport(script: Script): Promise<FakeServer> {
  let connections = 0;
  const { offersBitmap = true, sizeBytes = SIZE } = script;
  return startFakeServer(async (peer) => {
    const isMap = connections++ > 0;
    const bitmap: Record<string, number> = offersBitmap ? { [`qemu:dirty-bitmap:${BITMAP}`]: 7 } : {};
    await peer.handshake({ sizeBytes, contexts: isMap ? bitmap : { "base:allocation": 7 } });
    for (;;) await answer(peer, await peer.takeRequest(), isMap, script);
  });
}

async function answer(peer: FakePeer, request: FakeRequest, isMap: boolean, script: Script): Promise<void> {
  const { cookie, length, offset, type } = request;
  if (!isMap) script.requests?.push(request);
  if (type === 0) {
    peer.send(
      dataChunk(cookie, DONE, offset, (script.content ?? Buffer.alloc(SIZE)).subarray(offset, offset + length)),
    );
  } else if (type === 7) {
    const status = (isMap ? script.dirty : script.allocation)?.(request) ?? [[length, 0]];
    if (status === "error") peer.send(errorChunk(cookie, DONE, EINVAL, "not here"));
    else if (status === "nothing") peer.send(noneChunk(cookie));
    else peer.send(statusChunk(cookie, DONE, 7, status));
  } else if (type === 2) {
    peer.socket.end();
  } else {
    peer.send(noneChunk(cookie));
  }
}

function volumeOf(server: FakeServer, change: Partial<VmVolume> = {}): VmVolume {
  const nbdPath = server.address.transport === "unix" ? server.address.path : undefined;
  return { size: SIZE, bitmapMode: "reuse", bitmapName: BITMAP, nbdPath, ...change };
}

async function extentsOf(source: NbdSource): Promise<SourceExtent[]> {
  const extents: SourceExtent[] = [];
  for await (const extent of source.extents(never)) extents.push(extent);
  return extents;
}

const open = (server: FakeServer, change: Partial<VmVolume> = {}): Promise<NbdSource> =>
  NbdSource.open(DEVICE, volumeOf(server, change), TIMEOUTS, never);

describe("NbdSource.extents()", () => {
  it("takes for zero only what is flagged zero: a hole may hold anything", async () => {
    const quarter = SIZE / 4;
    await using server = await startExport({
      allocation: () => [
        [quarter, HOLE],
        [quarter, ZERO],
        [quarter, HOLE | ZERO],
        [quarter, 0],
      ],
    });
    await using source = await open(server, { bitmapMode: "new" });
    expect((await extentsOf(source)).map(({ zero }) => zero)).toEqual([false, true, true, false]);
  });

  it("asks nothing outside the dirty ranges, and reads nothing there", async () => {
    const requests: FakeRequest[] = [];
    await using server = await startExport({
      requests,
      dirty: () => [
        [128 * KIB, 0],
        [64 * KIB, 1],
        [SIZE - 192 * KIB, 0],
      ],
    });
    await using source = await open(server);
    expect(await source.dirtyBytes(never)).toBe(64 * KIB);
    expect(await extentsOf(source)).toEqual([{ offset: 128 * KIB, length: 64 * KIB, zero: false }]);
    expect(requests.map(({ offset, length }) => [offset, length])).toEqual([[128 * KIB, 64 * KIB]]);
  });

  it("makes no request at all on a clean bitmap", async () => {
    const requests: FakeRequest[] = [];
    await using server = await startExport({ requests, dirty: ({ length }) => [[length, 0]] });
    await using source = await open(server);
    expect(await source.dirtyBytes(never)).toBe(0);
    expect(await extentsOf(source)).toEqual([]);
    expect(requests).toEqual([]);
  });

  it("goes on where the server described only the beginning", async () => {
    await using server = await startExport({
      allocation: ({ offset }) => [[Math.min(192 * KIB, SIZE - offset), offset % (384 * KIB) === 0 ? 0 : ZERO]],
      dirty: ({ offset }) => [[Math.min(320 * KIB, SIZE - offset), 1]],
    });
    await using source = await open(server);
    const extents = await extentsOf(source);
    let end = 0;
    for (const { offset, length } of extents) {
      expect(offset).toBe(end);
      end += length;
    }
    expect(end).toBe(SIZE);
    expect(extents.some(({ zero }) => zero)).toBe(true);
  });

  it.each([
    ["an error", "error"],
    ["an answer without extents", "nothing"],
  ] as const)("fails for %s about the bitmap: it never means clean", async (_what, status) => {
    await using server = await startExport({ dirty: () => status });
    await using source = await open(server);
    expect((await refusalOf(extentsOf(source))).code).toBe("SOURCE");
    expect((await refusalOf(source.dirtyBytes(never))).code).toBe("SOURCE");
  });

  it.each([
    ["an error", "error"],
    ["an answer without extents", "nothing"],
  ] as const)("fails for %s about the allocation: it never means zero", async (_what, status) => {
    await using server = await startExport({ allocation: () => status, dirty: ({ length }) => [[length, 1]] });
    await using source = await open(server);
    expect((await refusalOf(extentsOf(source))).code).toBe("SOURCE");
  });

  it("fails if the map breaks off in the middle", async () => {
    await using server = await startExport({ dirty: ({ offset }) => (offset === 0 ? [[SIZE / 2, 0]] : "error") });
    await using source = await open(server);
    expect((await refusalOf(extentsOf(source))).code).toBe("SOURCE");
  });
});

describe("NbdSource.open()", () => {
  it("refuses a bitmap that is named but not offered", async () => {
    await using server = await startExport({ offersBitmap: false });
    expect(await refusalOf(open(server))).toEqual({
      code: "INVALID_PARAMS",
      message: `Cannot back up "${DEVICE}": QEMU does not offer the bitmap "${BITMAP}" with its NBD export`,
    });
  });

  it("refuses a reused bitmap without a name, and a volume without a socket", async () => {
    await using server = await startExport({});
    expect((await refusalOf(open(server, { bitmapName: undefined }))).message).toContain("does not name it");
    expect((await refusalOf(open(server, { nbdPath: undefined }))).message).toContain("no NBD socket");
  });

  it("refuses an export of another size", async () => {
    await using server = await startExport({ sizeBytes: SIZE * 2 });
    expect(await refusalOf(open(server))).toEqual({
      code: "INVALID_PARAMS",
      message: `Cannot back up "${DEVICE}": its NBD export has ${SIZE * 2} bytes, PVE said ${SIZE}`,
    });
  });

  it("leaves no connection behind when it refuses", async () => {
    await using server = await startExport({ offersBitmap: false });
    await refusalOf(open(server));
    await expect.poll(() => server.connections.size).toBe(0);
  });
});

describe("NbdSource.read()", () => {
  it("reads a hole that is not flagged zero", async () => {
    const content = Buffer.alloc(SIZE, 0xee);
    await using server = await startExport({ allocation: ({ length }) => [[length, HOLE]], content });
    await using source = await open(server, { bitmapMode: "none", bitmapName: undefined });
    const [extent] = await extentsOf(source);
    expect(extent).toEqual({ offset: 0, length: SIZE, zero: false });
    const bytes = Buffer.alloc(64 * KIB);
    await source.read(128 * KIB, bytes, never);
    expect(bytes.equals(content.subarray(0, 64 * KIB))).toBe(true);
  });
});
