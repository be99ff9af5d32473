// SPDX-License-Identifier: AGPL-3.0-or-later
// Jobs while another process swaps names of the store at random, as fast as it can: no moment is known, and many at
// once are tried. TEST_SEED=N plays another raid.
import { spawn } from "node:child_process";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { isFull } from "../../support/fault/full-matrix.ts";
import { ShareAttacker } from "../../support/share/share-attacker.ts";
import {
  attributes,
  containerBackup,
  containerRestore,
  failedJob,
  listAll,
  vmBackup,
  vmRestore,
  withTwoPoints,
} from "../../support/share/share-jobs.ts";
import { type Job, ShareSite } from "../../support/share/share-site.ts";

const RAIDER = fileURLToPath(new URL("../../support/share/share-raider.mjs", import.meta.url));
const RAID_MS = isFull ? 120_000 : 5_000;
const seed = Number(process.env.TEST_SEED ?? 16);

/** Until it has ended by itself; ended by its pid if the test is over before. */
class Raid implements AsyncDisposable {
  readonly #child: ReturnType<typeof spawn>;
  readonly swaps: Promise<number>;
  isOver = false;

  constructor(site: ShareSite, seedOfRaid: number) {
    const { aside, host, pipe, store } = site.place;
    const linkable = host.linkable("guest.conf");
    const given = { store, host: host.path, linkable, aside, pipe, seed: seedOfRaid, ms: RAID_MS };
    this.#child = spawn(process.execPath, [RAIDER, JSON.stringify(given)], { stdio: ["ignore", "pipe", "inherit"] });
    let output = "";
    this.#child.stdout?.on("data", (data) => {
      output += String(data);
    });
    this.swaps = new Promise((resolve) =>
      this.#child.once("exit", () => {
        this.isOver = true;
        resolve(Number(output));
      }),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.isOver) this.#child.kill("SIGKILL");
    await this.swaps;
  }
}

/** The jobs in turns until the raid is over. */
async function raid(site: ShareSite, seedOfRaid: number, jobs: (n: number) => readonly Job[]): Promise<void> {
  site.reset();
  await using raider = new Raid(site, seedOfRaid);
  let played = 0;
  let refused = 0;
  for (let n = 0; !raider.isOver; n++) {
    for (const job of jobs(n)) {
      site.log.length = 0;
      const { message } = await site.attack(job, new ShareAttacker(site.place));
      if (message !== undefined) refused++;
      played++;
    }
  }
  expect(await raider.swaps).toBeGreaterThan(100);
  expect(refused, "attacks that hit something").toBeGreaterThan(0);
  console.info(`${await raider.swaps} swaps, ${played} jobs, ${refused} of them failed`);
  site.log.length = 0;
  await site.expectPointsRight();
  site.host.expectSameContent();
}

describe("a raid on the share", () => {
  it("leads no job on a VM out of the store", { timeout: RAID_MS + 120_000 }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await raid(site, seed, (n) => [
      vmBackup(site, 3000 + n * 2, "incremental"),
      listAll,
      vmRestore("backup/100/qemu-2000"),
      attributes("backup/100/qemu-2000"),
      failedJob(site, 3001 + n * 2),
    ]);
  });

  it("leads no job on a container out of the store", { timeout: RAID_MS + 120_000 }, async (context) => {
    await using site = await ShareSite.start(context, async (bare) => {
      await using provider = bare.provider();
      await containerBackup(bare, 1000)(provider);
    });
    await raid(site, seed + 1, (n) => [
      containerBackup(site, 2000 + n),
      listAll,
      containerRestore("backup/101/lxc-1000"),
    ]);
  });
});
