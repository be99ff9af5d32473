// SPDX-License-Identifier: AGPL-3.0-or-later
// PVE's hooks in the orders of jobs that die, through the real shim under perl -T and the real bridge: one provider
// object and one Node for everything that goes wrong in one job.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { type BridgeBundle, buildBridge } from "../support/bridge-process.ts";
import { ShimHooks } from "../support/hooks.ts";
import { processesNaming } from "../support/processes.ts";
import { type JobPlan, ModelContainer, ModelVm, playJob } from "../support/pve-job.ts";
import { TestNode } from "../support/vm-job.ts";
import { VmLedger } from "../support/vm-ledger.ts";
import { DISK, MIB, startGuest } from "../support/vm-rules.ts";

const TIMEOUT = { timeout: 120_000 };
const SCFG = { "dir-compression": "none" };

let bundle: BridgeBundle;
let node: TestNode;
let guest: LabGuest;
let ledger: VmLedger;
let vm: ModelVm;
let container: ModelContainer;

beforeAll(async () => {
  bundle = await buildBridge();
  node = await TestNode.create(SCFG);
  guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: 8 * MIB }] });
  ledger = new VmLedger(node, guest);
  vm = new ModelVm(node, guest, ledger);
  container = await ModelContainer.create(node, 200);
  await play({
    guests: [
      [vm, "nowhere"],
      [container, "nowhere"],
    ],
  });
}, 180_000);
afterAll(async () => {
  await guest[Symbol.asyncDispose]();
  await node[Symbol.asyncDispose]();
  await bundle[Symbol.asyncDispose]();
});

async function play(plan: JobPlan): Promise<void> {
  await guest.write(DISK, 4 * MIB, seededBytes(ledger.takeEpoch(), MIB / 4));
  {
    await using hooks = await ShimHooks.start(node, { bridge: bundle.path, scfg: SCFG });
    await playJob(hooks, plan, node);
  }
  expect(await processesNaming(bundle.path)).toEqual([]);
  expect(node.log.filter((line) => line.startsWith("perl:"))).toEqual([]);
}

describe("one job through the shim", () => {
  it("lives through every death of a guest, and job_cleanup twice", TIMEOUT, async () => {
    await play({
      guests: [
        ...([
          [vm, "backup limit"],
          [container, "backup limit"],
          [vm, "guest locked"],
        ] as const),
        ...([
          [vm, "backup_init"],
          [container, "backup_init"],
          [vm, "backup-start hook"],
          [vm, "nowhere"],
        ] as const),
        ...([
          [container, "after prepare"],
          [vm, "backup access"],
          [container, "copy"],
          [vm, "copy"],
        ] as const),
        ...([
          [container, "child killed"],
          [container, "nowhere"],
          [vm, "nowhere"],
        ] as const),
        ...([
          [vm, "protection"],
          [container, "protection"],
          [vm, "nowhere"],
        ] as const),
        ...([
          [vm, "backup-end hook"],
          [container, "backup-end hook"],
          [vm, "nowhere"],
        ] as const),
      ],
      dies: "job-end hook",
    });
    const kept = node.log.filter((line) => line.startsWith("warn: ") && line.includes("is kept"));
    expect(kept).toHaveLength(4); // two deaths after the copy, of two guests
  });

  it.each(["qemu", "lxc"] as const)("ends in order when a signal comes in mid-copy (%s)", TIMEOUT, async (type) => {
    await play({ guests: [[type === "qemu" ? vm : container, "signal in mid-copy"]] });
    const before = ledger.newest;
    expect(await ledger.backUp()).toBe(`incremental since ${before}`);
    await play({ guests: [[container, "nowhere"]] });
  });

  it.each(["job_init", "job-start hook", "job-end hook"] as const)("ends in order at %s", TIMEOUT, async (dies) => {
    await play({ guests: [], dies });
  });

  it("has left nothing but right backups", TIMEOUT, async () => {
    await ledger.expectAllRight();
    await container.expectAllRight();
  });
});
