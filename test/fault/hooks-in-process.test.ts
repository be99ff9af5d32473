// SPDX-License-Identifier: AGPL-3.0-or-later
// Every place where a backup job of PVE can die, first or second guest of the job, VM or container: the calls that
// PVE makes then, on one provider object. What backup_vm returned from stays, nothing else does, and the next backup
// is right.
import { afterAll, beforeAll, describe, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { ProviderHooks } from "../support/bridge/hooks.ts";
import { ModelSite } from "../support/vm/model-site.ts";
import { DEATHS, type Death, type JobPlan, type ModelGuest, playJob } from "../support/vm/pve-job.ts";
import { DISK, MIB } from "../support/vm/vm-rules.ts";

const TIMEOUT = { timeout: 180_000 };

let site: ModelSite;
let writes = 0;

beforeAll(async () => {
  site = await ModelSite.create({ "dir-compression": "none" });
  const { container, vm } = site;
  await play({ guests: [vm, container].map((guest) => [guest, "nowhere"]) });
}, 180_000);
afterAll(() => site[Symbol.asyncDispose]());

async function play(plan: JobPlan): Promise<void> {
  await site.guest.write(DISK, 6 * MIB, seededBytes(++writes, MIB / 4));
  await using hooks = new ProviderHooks(site.node);
  await playJob(hooks, plan, site.node);
}

const TYPES = [
  ["VM", "qemu"],
  ["container", "lxc"],
] as const;

describe.each(TYPES)("a %s's backup that dies", (_what, type) => {
  /** The one that dies, and its companion. */
  const guests = (): [ModelGuest, ModelGuest] => {
    const { container, vm } = site;
    return type === "qemu" ? [vm, container] : [container, vm];
  };

  it.each(DEATHS[type])("as the first of a job: %s", TIMEOUT, async (death: Death) => {
    const [dying, other] = guests();
    await play({
      guests: [
        [dying, death],
        [other, "nowhere"],
      ],
    });
    if (type === "qemu") await site.expectNextVmBackup();
    else await play({ guests: [[dying, "nowhere"]] });
  });

  it.each(DEATHS[type])("as the last of a job whose end fails too: %s", TIMEOUT, async (death: Death) => {
    const [dying, other] = guests();
    await play({
      guests: [
        [other, "nowhere"],
        [dying, death],
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
      await site.vm.expectSettled();
      await site.expectNextVmBackup();
    },
  );
});

describe("the store of all these jobs", () => {
  it("holds nothing but right backups", TIMEOUT, async () => {
    await site.expectNextVmBackup();
    await site.expectAllRight();
  });
});
