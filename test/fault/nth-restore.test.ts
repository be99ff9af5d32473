// SPDX-License-Identifier: AGPL-3.0-or-later
// One whole restore of a VM: each of its operations on the store (locks) and on the folder for mounts fails. Either
// every disk is right, or one sentence says why not; no server, no mount and no lock stays behind for good.
// biome-ignore assist/source/organizeImports: it must come before the product
import { errnosFor, type Fault, faultSwitch, type Operation, stepsOf } from "../support/fault/fault-fs.ts";
import { readdir } from "node:fs/promises";
import { describe, expect, it, onTestFailed } from "vitest";
import { compareRaw } from "../../fixtures/lab/index.ts";
import { endOwners } from "../support/fault/fault-folder.ts";
import { FaultSite } from "../support/fault/fault-job.ts";
import { expectNothingRuns, KINDS_OF_A_RESTORE, sentenceOf } from "../support/fault/fault-rules.ts";
import { isFull, MATRIX_TIMEOUT_MS } from "../support/fault/full-matrix.ts";
import { restore } from "../support/vm/vm-job.ts";

interface Outcome {
  readonly error: unknown;
  /** The disks that were read and right. */
  readonly right: readonly string[];
  readonly operations: readonly Operation[];
}

async function restoreWith(site: FaultSite, fault?: Fault): Promise<Outcome> {
  const right: string[] = [];
  faultSwitch.arm(site.folders, fault);
  const error = await restore(site.node, site.newest, async (device, rawPath) => {
    const oracle = site.points.get(site.newest)?.get(device) ?? "no such copy";
    const { detail, identical } = await compareRaw(rawPath, oracle);
    if (!identical) throw new Error(`${device} is wrong: ${detail}`);
    right.push(device);
  }).then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  faultSwitch.disarm();
  return { error, right, operations: [...faultSwitch.operations] };
}

async function mustRestore(site: FaultSite): Promise<Outcome> {
  const outcome = await restoreWith(site);
  expect(outcome.error).toBeUndefined();
  expect(outcome.right).toEqual(["drive-scsi0", "drive-scsi1"]);
  await expectNothingRuns(site.runDir);
  expect(await readdir(site.runDir)).toEqual([]);
  return outcome;
}

describe("a restore", () => {
  it.for<[Fault["flavour"], number, number]>([
    ["before", 1, 0],
    ["after", 3, 1],
    ["onwards", 3, 2],
    ["short", 1, 0],
  ])("is right or fails when its Nth operation fails (%s)", { timeout: MATRIX_TIMEOUT_MS }, async (how) => {
    const [flavour, every, offset] = how;
    await using site = await FaultSite.create({ "dir-compression": "zstd" });
    await site.startAgain();
    await site.job();
    const all = stepsOf((await mustRestore(site)).operations);
    expect(new Set(all.map(({ kind }) => kind))).toEqual(new Set(KINDS_OF_A_RESTORE));
    const steps = all.filter(({ kind }) => kind === "write" || flavour !== "short");
    let cell = "";
    onTestFailed(() => console.info(cell));
    for (const at of steps.filter((_, index) => isFull || index % every === offset)) {
      for (const errno of errnosFor(at.kind)) {
        cell = `${flavour} ${errno}: ${at.occurrence}. ${at.name}`;
        const { error, right } = await restoreWith(site, { at, errno, flavour });
        expect(faultSwitch.fired).toBeDefined();
        await expectNothingRuns(site.runDir);
        if (error === undefined) expect(right).toEqual(["drive-scsi0", "drive-scsi1"]);
        else sentenceOf(error);
        if ((await readdir(site.runDir).catch(() => [])).length > 0) await endOwners(site.runDir);
        if (error !== undefined) await mustRestore(site);
      }
    }
    await mustRestore(site);
    await site.expectNextBackup("all"); // and sweeps the locks that stayed
  });
});
