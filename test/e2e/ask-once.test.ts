// SPDX-License-Identifier: AGPL-3.0-or-later
// What a job asks the storage, which on a network share is a round trip each: every manifest and every header that is
// there is read at most twice in a backup, at the question and at the commit, and once in a restore.

import { readlinkSync } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { afterEach, describe, expect, it, vi } from "vitest";
import { LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { onNamedCall } from "../support/fault/fault-fs.ts"; // before the product
import { TestNode } from "../support/node/test-node.ts";
import { backUp, restore } from "../support/vm/vm-job.ts";
import { expectRestores, MIB, mustBackUp, VMID } from "../support/vm/vm-rules.ts";

const FEW_DISKS = 1;
const MANY_DISKS = 4;
const SHORT_CHAIN = 4;
const LONG_CHAIN = 16;

afterEach(() => {
  onNamedCall(undefined);
  vi.restoreAllMocks();
});

/** Calls below the store that name something, by path, and reads of headers, by path. */
interface Asked {
  readonly calls: readonly string[];
  readonly manifestReads: ReadonlyMap<string, number>;
  readonly headerReads: ReadonlyMap<string, number>;
}

const count = (counts: Map<string, number>, key: string): void => void counts.set(key, (counts.get(key) ?? 0) + 1);

/** What `work` asks of what is in `storePath` before it. */
async function record(storePath: string, work: () => Promise<void>): Promise<Asked> {
  const calls: string[] = [];
  const manifestReads = new Map<string, number>();
  const headerReads = new Map<string, number>();
  await using some = await open("/dev/null");
  const prototype = Object.getPrototypeOf(some) as FileHandle;
  const read = prototype.read as (...args: unknown[]) => Promise<{ bytesRead: number }>;
  vi.spyOn(prototype, "read").mockImplementation(async function (this: FileHandle, ...args: unknown[]) {
    const file = readlinkSync(`/proc/self/fd/${this.fd}`);
    const position = args.length > 1 ? args[3] : (args[0] as { position?: unknown } | undefined)?.position;
    if (file.startsWith(storePath) && file.endsWith(".qcow2") && position === 0) count(headerReads, file);
    return (await read.apply(this, args)) as never;
  });
  onNamedCall(({ kind, paths }) => {
    for (const path of paths.filter((one) => one.startsWith(storePath))) {
      calls.push(path);
      if (kind === "read" && path.endsWith("/manifest.json")) count(manifestReads, path);
    }
  });
  try {
    await work();
  } finally {
    onNamedCall(undefined);
    vi.restoreAllMocks();
  }
  return { calls, manifestReads, headerReads };
}

/** One more incremental backup of `disks` disks on a chain of `length`, and the restore of it. */
async function measure(disks: number, length: number): Promise<{ backup: Asked; restored: Asked }> {
  await using node = await TestNode.create({ "dir-verify-restore": 0 });
  const devices = Array.from({ length: disks }, (_, index) => `drive-scsi${index}`);
  await using guest = await LabGuest.start({
    ...{ dir: `${node.dir}/vm`, root: node.root, vmid: VMID, storeid: node.storeid },
    disks: devices.map((device) => ({ device, sizeBytes: 8 * MIB })),
  });
  for (let epoch = 1; epoch <= length; epoch++) {
    for (const device of devices) await guest.write(device, 0, seededBytes(`${device} ${epoch}`, 65536));
    const { error } = await backUp(node, guest, { epoch });
    expect(error).toBeUndefined();
  }
  const old = (path: string): boolean => !/(staging|qemu-9999)/.test(path);
  let last: Awaited<ReturnType<typeof mustBackUp>> | undefined;
  const backup = await record(node.storePath, async () => {
    last = await mustBackUp(node, guest, { epoch: 9999 });
  });
  expect([...(last?.job.modes.values() ?? [])]).toEqual(devices.map(() => "use"));
  const restored = await record(node.storePath, async () => {
    await restore(node, "backup/100/qemu-9999", async () => undefined);
  });
  if (last !== undefined) await expectRestores(node, last);
  const existing = (asked: Asked): Asked => ({
    calls: asked.calls.filter(old),
    manifestReads: new Map([...asked.manifestReads].filter(([path]) => old(path))),
    headerReads: new Map([...asked.headerReads].filter(([path]) => old(path))),
  });
  const [ofBackup, ofRestore] = [existing(backup), existing(restored)];
  expect(ofBackup.manifestReads.size).toBe(length); // the counter counts
  expect(ofBackup.headerReads.size).toBe(length * disks);
  expect(ofRestore.headerReads.size).toBe(length * disks);
  expect(Math.max(...ofBackup.manifestReads.values())).toBeLessThanOrEqual(2);
  expect(Math.max(...ofBackup.headerReads.values())).toBeLessThanOrEqual(2);
  expect(Math.max(...restored.manifestReads.values())).toBe(1);
  expect(Math.max(...ofRestore.headerReads.values())).toBe(1);
  return { backup: ofBackup, restored: ofRestore };
}

const isImage = (path: string): boolean => path.endsWith(".qcow2");
const isDigests = (path: string): boolean => path.endsWith(".digests");

describe("a backup and its restore", () => {
  it("ask each image a fixed number of times, and everything else by disks plus points", async () => {
    const shapes = [
      [FEW_DISKS, SHORT_CHAIN],
      [FEW_DISKS, LONG_CHAIN],
      [MANY_DISKS, SHORT_CHAIN],
      [MANY_DISKS, LONG_CHAIN],
    ] as const;
    const results = [];
    for (const [disks, length] of shapes) results.push(await measure(disks, length));
    for (const job of ["backup", "restored"] as const) {
      const others = results.map(
        (result) => result[job].calls.filter((path) => !isImage(path) && !isDigests(path)).length,
      );
      const images = results.map((result) => result[job].calls.filter(isImage).length);
      const [fewShort = 0, fewLong = 0, manyShort = 0, manyLong = 0] = others;
      // Of a + b * disks + c * points nothing is left: what grows with disks * points would be.
      expect(Math.abs(manyLong - fewLong - manyShort + fewShort), `${job}: ${others}`).toBeLessThanOrEqual(
        LONG_CHAIN / 4,
      );
      const perImageOf = (counts: number[]): number[] =>
        counts.map((calls, at) => calls / ((shapes[at]?.[0] ?? 1) * (shapes[at]?.[1] ?? 1)));
      const perImage = perImageOf(images);
      const digests = perImageOf(results.map((result) => result[job].calls.filter(isDigests).length));
      expect(Math.max(...digests), `${job}: ${digests}`).toBeLessThanOrEqual(job === "backup" ? 3 : 1);
      expect(Math.max(...perImage), `${job}: ${perImage}`).toBeLessThanOrEqual(job === "backup" ? 9 : 6);
    }
  }, 240_000);
});
