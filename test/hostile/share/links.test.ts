// SPDX-License-Identifier: AGPL-3.0-or-later
// What a writer of the share would try first: something else lies where a store has folders, locks and records.
import { existsSync, renameSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { sentenceOf } from "../../support/fault/fault-rules.ts";
import { isFull } from "../../support/fault/full-matrix.ts";
import { PLANTS, type Plant, ShareAttacker } from "../../support/share/share-attacker.ts";
import { attributes, listAll, vmBackup, vmRestore, withTwoPoints } from "../../support/share/share-jobs.ts";
import { type Job, ShareSite, VM } from "../../support/share/share-site.ts";

const NEWEST = "backup/100/qemu-2000";

/** Puts `plant` in the place of `name` below the guest's folder, and keeps what was there away. */
function plantAt(site: ShareSite, name: string, plant: Plant): void {
  const file = path.join(site.storePath, String(VM), name);
  const kept = path.join(site.dir, "aside/kept");
  const isThere = existsSync(file);
  if (isThere) renameSync(file, kept);
  new ShareAttacker(site.place).plant(file, plant, isThere ? kept : undefined);
}

/** What reads, one after the other; each may be refused. */
const readAll: Job = async (provider) => {
  const output: unknown[] = [];
  for (const job of [listAll, vmRestore(NEWEST), attributes(NEWEST)]) {
    output.push(await job(provider).catch((error: unknown) => sentenceOf(error)));
  }
  return output;
};

/** Every job there is, each on the share as somebody left it. */
async function playJobs(site: ShareSite, name: string, plants: readonly Plant[]): Promise<void> {
  const jobs = [
    ["backup", vmBackup(site, 3000, "incremental")],
    ["reading", readAll],
  ] as const;
  const problems: string[] = [];
  for (const plant of plants) {
    for (const [what, job] of jobs) {
      site.reset();
      plantAt(site, name, plant);
      try {
        await site.attack(job, new ShareAttacker(site.place));
        if (what === "backup") await site.expectPointsRight();
      } catch (error) {
        problems.push(`${what}, ${plant}: ${(error as Error).message.slice(0, 700)}`);
        site.restoreHost();
      }
      site.oracles.delete("backup/100/qemu-3000");
    }
  }
  expect(problems).toEqual([]);
  site.host.expectSameContent();
}

describe("a store in which something else has the place of", () => {
  it.for(["", ".locks", "failed", ".trash-x", ".staging-x", "qemu-1000", "qemu-2000", "qemu-4000"])(
    "a folder is used without leaving it: %j",
    async (name, context) => {
      await using site = await ShareSite.start(context, withTwoPoints);
      await playJobs(site, name, isFull ? PLANTS : ["link to a folder", "folder of links"]);
    },
  );

  it.for([
    ".lock",
    "state.json",
    ".tmp-old",
    "qemu-2000/manifest.json",
    "qemu-2000/attributes.json",
    "qemu-2000/guest.conf",
    "qemu-2000/drive-scsi0.qcow2",
    "qemu-1000/drive-scsi0.qcow2",
    "qemu-2000/backup.log",
  ])("a file is used without leaving it: %j", async (name, context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await playJobs(site, name, isFull ? PLANTS : ["link to a file", "hard link", "pipe"]);
  });
});
