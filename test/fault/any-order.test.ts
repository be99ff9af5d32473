// SPDX-License-Identifier: AGPL-3.0-or-later
// The hooks in any order, with processes that end in between: what backup_vm returned from is listed and
// restores bit for bit; nothing else is ever listed.
import path from "node:path";
import { describe, expect, it } from "vitest";
import { type LabGuest, SeededRandom, seededBytes } from "../../fixtures/lab/index.ts";
import { HostError } from "../../src/core/index.ts";
import type { DirectoryProvider } from "../../src/directory/directory-provider.ts";
import { TestNode } from "../support/node/test-node.ts";
import { list } from "../support/vm/vm-job.ts";
import { copyDisks, DISK, DISK_BYTES, expectRestores, MIB, never, startGuest, VMID } from "../support/vm/vm-rules.ts";

const STEPS = 110;

class Chaos {
  readonly node: TestNode;
  readonly guest: LabGuest;
  readonly random: SeededRandom;
  readonly points = new Map<string, ReadonlyMap<string, string>>();
  refusals = 0;
  provider: DirectoryProvider;
  #archive = "none";
  #answers: ReadonlyMap<string, "new" | "use"> = new Map();
  #step = 0;

  constructor(node: TestNode, guest: LabGuest, seed: number) {
    this.node = node;
    this.guest = guest;
    this.random = new SeededRandom(seed);
    this.provider = node.provider();
  }

  async step(): Promise<void> {
    this.#step++;
    try {
      await this.#anything();
    } catch (error) {
      expect(error, String(error)).toBeInstanceOf(HostError); // refused in words of ours, never a crash
      this.refusals++;
    }
  }

  async #anything(): Promise<void> {
    const { guest, provider, random } = this;
    // backup_init, the question and the copy come in this order more often than by chance alone.
    const call = random.integer(0, 16);
    if (call <= 2) {
      const epoch = 1000 + random.integer(0, STEPS);
      this.#archive = (await provider.backup.backupInit(VMID, "qemu", epoch, never)).archiveName;
      if (call === 0) return;
      this.#answers = await provider.backup.backupVmQueryIncremental(VMID, guest.devices, never);
      if (call === 2) await this.#copy();
    } else if (call <= 4) {
      this.#answers = await provider.backup.backupVmQueryIncremental(VMID, guest.devices, never);
    } else if (call <= 7) await this.#copy();
    else if (call <= 9) await provider.backup.backupCleanup(VMID, "qemu", random.integer(0, 2) === 0, "any", never);
    else if (call === 10) await provider.backup.backupHandleLogFile(VMID, path.join(this.node.dir, "no.log"));
    else if (call === 11) await provider.backup.jobCleanup(never);
    else if (call === 12) await provider.backup.jobInit();
    else if (call === 13) await this.#restartProvider();
    else await guest.write(DISK, random.integer(0, DISK_BYTES / MIB - 2) * MIB, seededBytes(this.#step, MIB));
  }

  /** The copy of whatever job there is, with whatever was answered last, in this job or an earlier one. */
  async #copy(): Promise<void> {
    const oracleDir = path.join(this.node.dir, `oracle-${this.#step}`);
    const access = await this.guest.openBackup({ modes: this.#answers, oracleDir });
    try {
      await copyDisks(this.provider, this.guest, access);
      this.points.set(`backup/${this.#archive}`, access.oracles);
      await access.finish(true);
    } finally {
      await access.finish(false);
    }
  }

  async #restartProvider(): Promise<void> {
    await this.provider[Symbol.asyncDispose]();
    this.provider = this.node.provider();
  }
}

describe("the hooks in any order", () => {
  it.each([1, 2])("never make or lose a point (seed %i)", { timeout: 180_000 }, async (seed) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await startGuest(node);
    const chaos = new Chaos(node, guest, seed);
    for (let step = 0; step < STEPS; step++) {
      await chaos.step();
      expect(new Set(await list(node, VMID))).toEqual(new Set(chaos.points.keys()));
    }
    await chaos.provider[Symbol.asyncDispose]();
    expect(chaos.points.size).toBeGreaterThan(5);
    expect(chaos.refusals).toBeGreaterThan(5);
    expect(node.log.filter((line) => line.includes("incremental backup (")).length).toBeGreaterThan(2);
    await expectRestores(node, ...[...chaos.points].map(([volname, oracles]) => ({ volname, oracles })));
  });
});
