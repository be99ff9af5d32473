// SPDX-License-Identifier: AGPL-3.0-or-later
// Every place where a backup job of PVE can die, first or second guest of the job, VM or container: the calls that
// PVE makes then, on one provider object. What backup_vm returned from stays, nothing else does, and the next backup
// is right.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { ProviderHooks } from "../support/hooks.ts";
import { DEATHS, type Death, type JobPlan, ModelContainer, ModelVm, playJob } from "../support/pve-job.ts";
import { TestNode } from "../support/vm-job.ts";
import { VmLedger } from "../support/vm-ledger.ts";
import { DISK, MIB, startGuest } from "../support/vm-rules.ts";

const TIMEOUT = { timeout: 180_000 };

let node: TestNode;
let guest: LabGuest;
let ledger: VmLedger;
let vm: ModelVm;
let container: ModelContainer;
let writes = 0;

beforeAll(async () => {
  node = await TestNode.create({ "dir-compression": "none" });
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
});

async function play(plan: JobPlan): Promise<void> {
  await guest.write(DISK, 6 * MIB, seededBytes(++writes, MIB / 4));
  await using hooks = new ProviderHooks(node);
  await playJob(hooks, plan, node);
}

/** A VM that failed before keeps its bitmap: its next backup is incremental, and right. */
async function expectNextBackup(): Promise<void> {
  const before = ledger.newest;
  expect(await ledger.backUp()).toBe(`incremental since ${before}`);
}

describe("a VM's backup that dies", () => {
  it.each(DEATHS.qemu)("as the first of a job: %s", TIMEOUT, async (death: Death) => {
    await play({
      guests: [
        [vm, death],
        [container, "nowhere"],
      ],
    });
    await expectNextBackup();
  });

  it.each(DEATHS.qemu)("as the last of a job whose end fails too: %s", TIMEOUT, async (death: Death) => {
    await play({
      guests: [
        [container, "nowhere"],
        [vm, death],
      ],
      dies: "job-end hook",
    });
  });
});

describe("a container's backup that dies", () => {
  it.each(DEATHS.lxc)("as the first of a job: %s", TIMEOUT, async (death: Death) => {
    await play({
      guests: [
        [container, death],
        [vm, "nowhere"],
      ],
    });
    await play({ guests: [[container, "nowhere"]] });
  });

  it.each(DEATHS.lxc)("as the last of a job whose end fails too: %s", TIMEOUT, async (death: Death) => {
    await play({
      guests: [
        [vm, "nowhere"],
        [container, death],
      ],
      dies: "job-end hook",
    });
  });
});

describe("a job that dies", () => {
  it.each(["job_init", "job-start hook", "job-end hook"] as const)(
    "without a guest, at %s, leaves nothing",
    async (dies) => {
      await play({ guests: [], dies });
      await vm.expectSettled();
      await expectNextBackup();
    },
  );
});

describe("the store of all these jobs", () => {
  it("holds nothing but right backups", TIMEOUT, async () => {
    await expectNextBackup();
    await ledger.expectAllRight();
    await container.expectAllRight();
  });
});
