// SPDX-License-Identifier: AGPL-3.0-or-later
// A container, the scripted vzdump and pct with real bridges, and the checks after each kill.
import { chown, readdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import { runTool } from "../../../fixtures/lab/index.ts";
import { ContainerNode, treeOf, VMID } from "../container/container-node.ts";
import type { Program } from "../programs/scripted-pve.ts";
import { GuestStage } from "./guest-stage.ts";
import { type Walk, walk } from "./kill-stage.ts";

/** Left out by the standard patterns. */
const LEFT_OUT = ["lost+found", "tmp/junk", "var/tmp/junk"];
/** The container's root, as the node sees it. */
const FIRST_ID = 100_000;
const GUEST = { mounts: {}, excludes: [] };

interface KilledContainerJob extends Walk {
  /** The job's point is in the store. */
  readonly isListed: boolean;
}

export class ContainerStage extends GuestStage<KilledContainerJob> {
  readonly node: ContainerNode;
  readonly #points = new Set<string>();
  readonly #guest: Record<string, unknown>;
  /** Names in an undisturbed backup. */
  #members: string[] = [];

  private constructor(node: ContainerNode, guest: Record<string, unknown>) {
    super(VMID);
    this.node = node;
    this.#guest = { ...GUEST, ...guest };
  }

  /** With one backup in the store. @param files further files of the container, by their paths in it */
  static async create(
    scfg: Record<string, unknown>,
    guest: Record<string, unknown> = {},
    files: Readonly<Record<string, Buffer>> = {},
  ): Promise<ContainerStage> {
    const stage = new ContainerStage(await ContainerNode.create(scfg), guest);
    for (const [name, bytes] of Object.entries(files)) {
      const file = path.join(stage.node.containerRoot, name);
      await writeFile(file, bytes);
      await chown(file, FIRST_ID, FIRST_ID);
    }
    await stage.next("the first");
    return stage;
  }

  vzdump(args: readonly string[] = [], job: Record<string, unknown> = {}): Promise<Program> {
    return this.node.vzdump(this.#guest, { args, job });
  }

  override async judge(walked: Walk): Promise<KilledContainerJob> {
    await this.expectNoSurvivors();
    const folder = path.join(this.node.storePath, String(VMID));
    const listed = (await readdir(folder).catch(() => [])).filter((name) => name.startsWith("lxc-"));
    const fresh = listed.filter((name) => !this.#points.has(name));
    expect(fresh.length, walked.output).toBeLessThanOrEqual(1);
    expect(listed.length, walked.output).toBe(this.#points.size + fresh.length);
    for (const name of fresh) await this.#expectWhole(path.join(folder, name));
    for (const name of fresh) this.#points.add(name);
    return { ...walked, isListed: fresh.length > 0 };
  }

  /** The next backup, undisturbed. */
  async next(cell: string): Promise<void> {
    const { isListed, output, status } = await this.judge(await walk(await this.vzdump()));
    expect([cell, status, isListed], output).toEqual([cell, 0, true]);
    expect(output, cell).not.toMatch(/^(?:WARN|ERROR)/m);
    expect(await this.leftovers(), cell).toEqual([]);
  }

  /** The newest point, restored by the scripted pct, equals the container. */
  async expectRestores(bundle = this.node.bundle): Promise<void> {
    const target = path.join(this.node.dir, "restored");
    const { output, status } = await (await this.node.restore(this.newest, target, [], bundle)).result;
    expect(status, output).toBe(0);
    expect(await treeOf(target)).toEqual(await treeOf(this.node.containerRoot, LEFT_OUT));
  }

  get newest(): string {
    return `backup/${VMID}/${[...this.#points].sort().at(-1)}`;
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    this.continueHalted();
    await this.node[Symbol.asyncDispose]();
  }

  /** Checked with standard tools: complete, and everything that tar can compare is the same. */
  async #expectWhole(folder: string): Promise<void> {
    const archive = (await readdir(folder)).find((name) => name.startsWith("archive.")) ?? "no archive";
    const file = path.join(folder, archive);
    const isTar = archive.startsWith("archive.tar");
    const list = isTar ? await runTool("tar", ["-tf", file]) : await runTool("unsquashfs", ["-l", file]);
    const members = list
      .split("\n")
      .filter((name) => name !== "")
      .sort();
    if (this.#members.length === 0) this.#members = members;
    expect(members.length).toBeGreaterThan(20);
    expect(members).toEqual(this.#members);
    if (!isTar) return;
    const compare = ["--compare", "--numeric-owner", "-f", file, "-C", this.node.containerRoot];
    const said = await runTool("tar", compare).catch((error: Error) => error.message.replace("tar failed: ", ""));
    // The archive has the owners as seen by the container.
    expect(said.split("\n").filter((line) => !/^$|: [UG]id differs$/.test(line))).toEqual([]);
  }
}
