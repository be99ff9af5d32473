// SPDX-License-Identifier: AGPL-3.0-or-later
// What a store must hold for one guest after everything that went wrong: each point with the disks as they were at
// its time. Stock qemu-img judges the files as they are in the store; the newest is restored as PVE does it.
import { readdir } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import { compareImages, type LabGuest } from "../../../fixtures/lab/index.ts";
import type { TestNode } from "../node/test-node.ts";
import { list } from "./vm-job.ts";
import { expectRestores, modeOf, mustBackUp } from "./vm-rules.ts";

type Oracles = ReadonlyMap<string, string>;

export class VmLedger {
  readonly node: TestNode;
  readonly guest: LabGuest;
  readonly points = new Map<string, Oracles>();
  #epoch: number;

  constructor(node: TestNode, guest: LabGuest, firstEpoch = 1000) {
    this.node = node;
    this.guest = guest;
    this.#epoch = firstEpoch;
  }

  /** A second in which nothing has been backed up yet. */
  takeEpoch(): number {
    return this.#epoch++;
  }

  get newest(): string | undefined {
    return [...this.points.keys()].at(-1);
  }

  /** A point that must exist from now on. */
  add(volname: string, oracles: Oracles): void {
    this.points.set(volname, oracles);
  }

  /** Only the points are listed, and there are no staging directories, locks or temporary files. */
  async expectSettled(): Promise<void> {
    expect(new Set(await list(this.node, this.guest.vmid))).toEqual(new Set(this.points.keys()));
    const folder = path.join(this.node.storePath, String(this.guest.vmid));
    const names = await readdir(folder).catch((): string[] => []);
    const known = new Set([...this.points.keys()].map((volname) => path.basename(volname)));
    const left = names.filter((name) => !known.has(name) && !["state.json", "failed", ".locks"].includes(name));
    expect([...left, ...(await readdir(path.join(folder, ".locks")).catch((): string[] => []))]).toEqual([]);
  }

  /** The next backup succeeds and is right. @returns its mode as the log says it */
  async backUp(): Promise<string> {
    const { job, volname, oracles } = await mustBackUp(this.node, this.guest, { epoch: this.takeEpoch() });
    this.add(volname, oracles);
    await this.#compare(volname, oracles);
    await this.expectSettled();
    return modeOf(job, [...oracles.keys()][0]);
  }

  /** Every point, bit for bit. */
  async expectAllRight(): Promise<void> {
    await this.expectSettled();
    for (const [volname, oracles] of this.points) await this.#compare(volname, oracles);
    const last = [...this.points].at(-1);
    if (last !== undefined) await expectRestores(this.node, { volname: last[0], oracles: last[1] });
  }

  async #compare(volname: string, oracles: Oracles): Promise<void> {
    for (const [device, oracle] of oracles) {
      const image = path.join(this.node.storePath, volname.replace(/^backup\//, ""), `${device}.qcow2`);
      expect(await compareImages(image, "qcow2", oracle, "raw"), `${volname} ${device}`).toMatchObject({
        identical: true,
      });
    }
  }
}
