// SPDX-License-Identifier: AGPL-3.0-or-later
// Where the jobs of pve-job.ts run: a node with a small VM and a container.
import { expect } from "vitest";
import type { LabGuest } from "../../../fixtures/lab/index.ts";
import { TestNode } from "../node/test-node.ts";
import { ModelContainer, ModelVm } from "./pve-job.ts";
import { VmLedger } from "./vm-ledger.ts";
import { DISK, MIB, startGuest } from "./vm-rules.ts";

const CTID = 200;

export class ModelSite implements AsyncDisposable {
  readonly node: TestNode;
  readonly guest: LabGuest;
  readonly ledger: VmLedger;
  readonly vm: ModelVm;
  readonly container: ModelContainer;

  private constructor(node: TestNode, guest: LabGuest, container: ModelContainer) {
    this.node = node;
    this.guest = guest;
    this.ledger = new VmLedger(node, guest);
    this.vm = new ModelVm(node, guest, this.ledger);
    this.container = container;
  }

  static async create(scfg: Record<string, unknown>): Promise<ModelSite> {
    const node = await TestNode.create(scfg);
    const guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: 8 * MIB }] });
    return new ModelSite(node, guest, await ModelContainer.create(node, CTID));
  }

  /** A VM that failed before keeps its bitmap: its next backup is incremental, and right. */
  async expectNextVmBackup(): Promise<void> {
    const before = this.ledger.newest;
    expect(await this.ledger.backUp()).toBe(`incremental since ${before}`);
  }

  async expectAllRight(): Promise<void> {
    await this.ledger.expectAllRight();
    await this.container.expectAllRight();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.guest[Symbol.asyncDispose]();
    await this.node[Symbol.asyncDispose]();
  }
}
