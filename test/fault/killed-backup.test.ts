// SPDX-License-Identifier: AGPL-3.0-or-later
// The process of a backup ends in every way there is, at every moment: nothing half-made is ever listed,
// nothing is left behind for good, and the next backup is right.
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { SeededRandom, seededBytes } from "../../fixtures/lab/index.ts";
import { type BridgeBundle, BridgeProcess, buildBridge } from "../support/bridge/bridge-process.ts";
import { TestNode } from "../support/node/test-node.ts";
import { processesNaming } from "../support/programs/processes.ts";
import { list } from "../support/vm/vm-job.ts";
import {
  DISK,
  DISK_BYTES,
  expectRestores,
  leftovers,
  MIB,
  modeOf,
  mustBackUp,
  startGuest,
  untilCopying,
  VMID,
} from "../support/vm/vm-rules.ts";

const SLOW = 2 * MIB;
const ROUNDS = 14;

let bundle: BridgeBundle;
beforeAll(async () => {
  bundle = await buildBridge();
});
afterAll(() => bundle[Symbol.asyncDispose]());

describe("a backup process killed with -9 in mid-copy", () => {
  it("leaves nothing listed; the next job sweeps, takes over the lock, and is incremental and right", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const first = await mustBackUp(node, guest, { epoch: 1000 });
    await guest.write(DISK, 4 * MIB, seededBytes("second", 8 * MIB));
    await using bridge = await BridgeProcess.start(bundle, node);
    const access = await bridge.openJob(guest, 2000, `${node.dir}/o2`);
    const copied = bridge.copyDisks(guest, access, SLOW);
    await untilCopying(node);
    await sleep(200);
    await bridge.end("SIGKILL");
    expect(await copied).toBe(false);
    await access.finish(false);
    expect(await list(node, VMID)).toEqual([first.volname]);
    expect(await leftovers(node)).toEqual([".lock", expect.stringMatching(/^\.staging-/)]);
    const third = await mustBackUp(node, guest, { epoch: 2000 }); // the name was never taken
    expect(modeOf(third.job)).toBe(`incremental since ${first.volname}`);
    expect(await leftovers(node)).toEqual([]);
    await expectRestores(node, first, third);
  });
});

describe("a backup process that is asked to end in mid-copy", () => {
  it.each([
    ["SIGTERM", 143],
    ["SIGINT", 130],
    ["EOF", 0],
  ] as const)("by %s removes its staging folder and its lock and exits with %i", async (how, code) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    await using bridge = await BridgeProcess.start(bundle, node);
    const access = await bridge.openJob(guest, 1000, `${node.dir}/o1`);
    const copied = bridge.copyDisks(guest, access, SLOW).catch(() => false);
    await untilCopying(node);
    expect(await bridge.end(how)).toEqual([code, null]);
    expect(await copied).toBe(false);
    expect(await leftovers(node)).toEqual([]);
    expect(await list(node, VMID)).toEqual([]);
    await access.finish(false);
    await expectRestores(node, await mustBackUp(node, guest, { epoch: 1000 }));
  });
});

describe("backup processes killed at any moment", () => {
  it("leave a store of which every listed point restores bit for bit", { timeout: 180_000 }, async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const random = new SeededRandom(20_264);
    const points = new Map<string, ReadonlyMap<string, string>>();
    let killed = 0;
    let wholeMs = 0;
    for (let round = 1; round <= ROUNDS; round++) {
      const epoch = 1000 + round;
      const length = random.integer(1, 5) * MIB;
      await guest.write(DISK, random.integer(0, (DISK_BYTES - length) / 512) * 512, seededBytes(round, length));
      await using bridge = await BridgeProcess.start(bundle, node);
      const access = await bridge.openJob(guest, epoch, `${node.dir}/o${epoch}`);
      // One in five tells how long it takes now; the others die between the first bytes and the moments after the commit.
      const isLeftAlone = round % 5 === 1;
      const startMs = performance.now();
      const copied = bridge.copyDisks(guest, access);
      if (!isLeftAlone) {
        await sleep(random.next() * 1.3 * wholeMs);
        await bridge.end("SIGKILL");
      }
      const isDone = await copied;
      if (isLeftAlone) wholeMs = performance.now() - startMs;
      if (!isDone) killed++;
      await access.finish(isDone);
      const listed = await list(node, VMID);
      const volname = `backup/100/qemu-${epoch}`;
      if (isDone) expect(listed).toContain(volname);
      if (listed.includes(volname)) points.set(volname, access.oracles);
      expect(new Set(listed)).toEqual(new Set(points.keys()));
    }
    expect(killed).toBeGreaterThan(0);
    expect(points.size).toBeGreaterThanOrEqual(ROUNDS / 5);
    const last = await mustBackUp(node, guest, { epoch: 9000 });
    expect(await leftovers(node)).toEqual([]);
    await expectRestores(node, ...[...points].map(([volname, oracles]) => ({ volname, oracles })), last);
    expect(await processesNaming(bundle.path)).toEqual([]);
  });
});
