// SPDX-License-Identifier: AGPL-3.0-or-later
// PVE's hooks in the orders of jobs that die, through the real shim under perl -T and the real bridge: one provider
// object and one Node for everything that goes wrong in one job.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { type BridgeBundle, buildBridge } from "../support/bridge/bridge-process.ts";
import { ShimHooks } from "../support/bridge/hooks.ts";
import { processesNaming } from "../support/programs/processes.ts";
import { ModelSite } from "../support/vm/model-site.ts";
import { type JobPlan, playJob } from "../support/vm/pve-job.ts";
import { DISK, MIB } from "../support/vm/vm-rules.ts";

const TIMEOUT = { timeout: 120_000 };
const SCFG = { "dir-compression": "none" };

let bundle: BridgeBundle;
let site: ModelSite;

beforeAll(async () => {
  bundle = await buildBridge();
  site = await ModelSite.create(SCFG);
  const { container, vm } = site;
  await play({ guests: [vm, container].map((guest) => [guest, "nowhere"]) });
}, 180_000);
afterAll(async () => {
  await site[Symbol.asyncDispose]();
  await bundle[Symbol.asyncDispose]();
});

async function play(plan: JobPlan): Promise<void> {
  const { guest, ledger, node } = site;
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
    const { container, node, vm } = site;
    await play({
      guests: [
        [vm, "backup limit"],
        [container, "backup limit"],
        [vm, "guest locked"],
        [vm, "backup_init"],
        [container, "backup_init"],
        [vm, "backup-start hook"],
        [vm, "nowhere"],
        [container, "after prepare"],
        [vm, "backup access"],
        [container, "copy"],
        [vm, "copy"],
        [container, "child killed"],
        [container, "nowhere"],
        [vm, "nowhere"],
        [vm, "protection"],
        [container, "protection"],
        [vm, "nowhere"],
        [vm, "backup-end hook"],
        [container, "backup-end hook"],
        [vm, "nowhere"],
      ],
      dies: "job-end hook",
    });
    const kept = node.log.filter((line) => line.startsWith("warn: ") && line.includes("is kept"));
    expect(kept).toHaveLength(4); // two deaths after the copy, of two guests
  });

  it.each(["vm", "container"] as const)(
    "ends in order when a signal comes in mid-copy (%s)",
    TIMEOUT,
    async (which) => {
      await play({ guests: [[site[which], "signal in mid-copy"]] });
      await site.expectNextVmBackup();
      await play({ guests: [[site.container, "nowhere"]] });
    },
  );

  it.each(["job_init", "job-start hook", "job-end hook"] as const)("ends in order at %s", TIMEOUT, async (dies) => {
    await play({ guests: [], dies });
  });

  it("has left nothing but right backups", TIMEOUT, async () => {
    await site.expectAllRight();
  });
});
