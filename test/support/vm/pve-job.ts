// SPDX-License-Identifier: AGPL-3.0-or-later
// A model of PVE's backup job: which hooks are called in which order when it dies at any place where it can.
// Source: pve-manager PVE/VZDump.pm, exec_backup and exec_backup_task; qemu-server and pve-container, archive().
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import { type LabBackup, type LabGuest, runTool } from "../../../fixtures/lab/index.ts";
import type { GuestType } from "../../../src/provider/index.ts";
import type { Hooks } from "../bridge/hooks.ts";
import type { TestNode } from "../node/test-node.ts";
import { list } from "./vm-job.ts";
import type { VmLedger } from "./vm-ledger.ts";
import { MIB, untilCopying } from "./vm-rules.ts";

/** Where one guest's backup dies, in the order of PVE's steps; "nowhere" is a success. */
export const DEATHS = {
  qemu: [
    ...["backup limit", "guest locked", "backup_init", "backup-start hook", "mechanism", "backup access", "copy"],
    ...["signal in mid-copy", "protection", "backup-end hook", "nowhere"],
  ],
  lxc: [
    ...["backup limit", "guest locked", "backup_init", "backup-start hook", "mechanism", "after prepare", "copy"],
    ...["signal in mid-copy", "child killed", "protection", "backup-end hook", "nowhere"],
  ],
} as const;
export type Death = (typeof DEATHS)[GuestType][number];
/** Where the job itself dies. */
type JobDeath = "nowhere" | "job_init" | "job-start hook" | "job-end hook";

export interface JobPlan {
  readonly guests: ReadonlyArray<readonly [ModelGuest, Death]>;
  readonly dies?: JobDeath;
}

class Died extends Error {}

/** One guest of the model: how it is archived, and what the store must hold for it afterwards. */
export interface ModelGuest {
  readonly vmid: number;
  readonly type: GuestType;
  takeEpoch(): number;
  /** For a backup that exists. */
  readonly takenEpoch: number;
  archive(hooks: Hooks, archiveName: string, death: Death): Promise<void>;
  teardown(): Promise<void>;
  expectSettled(): Promise<void>;
}

/** Plays the job to its end. The hooks that PVE does not expect to die must not die. */
export async function playJob(hooks: Hooks, plan: JobPlan, node: TestNode): Promise<void> {
  const dies = plan.dies ?? "nowhere";
  try {
    if (dies === "job_init") throw new Died("new_backup_provider or job_init");
    await hooks.jobInit();
    if (dies === "job-start hook") throw new Died(dies);
    for (const [guest, death] of plan.guests) await playGuest(hooks, guest, death, node);
    await hooks.jobCleanup();
    if (dies === "job-end hook") throw new Died(dies);
  } catch (error) {
    if (!(error instanceof Died)) throw error;
    await hooks.jobCleanup();
  }
}

async function playGuest(hooks: Hooks, guest: ModelGuest, death: Death, node: TestNode): Promise<void> {
  const { vmid, type } = guest;
  const logFile = path.join(node.dir, `${vmid}.log`);
  let vmtype: GuestType | undefined;
  let archiveName: string | undefined;
  let failure: unknown;
  const dieAt = (place: Death): void => {
    if (death === place) throw new Died(place);
  };
  try {
    dieAt("backup limit");
    vmtype = type;
    dieAt("guest locked");
    const epoch = death === "backup_init" ? guest.takenEpoch : guest.takeEpoch();
    archiveName = await hooks.backupInit(vmid, type, epoch);
    dieAt("backup-start hook");
    await hooks.mechanism(vmid, type);
    dieAt("mechanism");
    await guest.archive(hooks, archiveName, death);
    dieAt("protection");
    await hooks.cleanup(vmid, type, true);
    dieAt("backup-end hook");
  } catch (error) {
    failure = error;
  }
  expect(failure === undefined, String(failure)).toBe(death === "nowhere");
  if (!(failure instanceof Died)) expectSentence(failure);
  await guest.teardown();
  if (failure !== undefined) await hooks.cleanup(vmid, vmtype, false, String((failure as Error).message));
  await guest.expectSettled();
  if (vmtype !== undefined) {
    const text = `log of ${archiveName ?? "nothing"} ${death}\n`;
    await writeFile(logFile, text);
    await hooks.logFile(vmid, logFile);
    if (archiveName !== undefined) await expectLog(node, archiveName, text);
  }
  if (death === "signal in mid-copy") throw new Died("interrupted by signal");
}

function expectSentence(failure: unknown): void {
  if (failure !== undefined)
    expect((failure as Error).message).toMatch(/^(Cannot [^\n]*[^\n.]|interrupted by signal)$/);
}

/** Beside the backup, or where logs of failed jobs are kept. */
async function expectLog(node: TestNode, archiveName: string, text: string): Promise<void> {
  const folder = path.join(node.storePath, archiveName);
  const failed = path.join(path.dirname(folder), "failed", `${path.basename(folder)}.log`);
  const file = (await readdir(folder).catch(() => undefined)) === undefined ? failed : path.join(folder, "backup.log");
  expect(await readFile(file, "utf8")).toBe(text);
}

/** A VM of the lab. */
export class ModelVm implements ModelGuest {
  readonly type = "qemu";
  readonly #node: TestNode;
  readonly #guest: LabGuest;
  readonly #ledger: VmLedger;
  #access: LabBackup | undefined;
  #isTold = false;

  constructor(node: TestNode, guest: LabGuest, ledger: VmLedger) {
    this.#node = node;
    this.#guest = guest;
    this.#ledger = ledger;
  }

  get vmid(): number {
    return this.#guest.vmid;
  }

  takeEpoch(): number {
    return this.#ledger.takeEpoch();
  }

  get takenEpoch(): number {
    return epochOf(this.#ledger.newest);
  }

  async archive(hooks: Hooks, archiveName: string, death: Death): Promise<void> {
    const { vmid } = this;
    this.#isTold = false;
    const modes = await hooks.query(vmid, this.#guest.devices);
    if (death === "backup access") throw new Died(death);
    const oracleDir = path.join(this.#node.dir, `oracle-${archiveName.replace("/", "-")}`);
    this.#access = await this.#guest.openBackup({ modes, oracleDir });
    const { oracles, volumes } = this.#access;
    const lost = Object.entries(volumes).map(([device, volume]) => [device, { ...volume, "nbd-path": "/nowhere" }]);
    const wanted = death === "copy" ? (Object.fromEntries(lost) as LabBackup["volumes"]) : volumes;
    const options =
      death === "signal in mid-copy" ? { bandwidthLimit: MIB / 16, interrupt: untilCopying(this.#node, vmid) } : {};
    await hooks.backupVm(vmid, this.#guest.guestConfig, wanted, options);
    this.#ledger.add(`backup/${archiveName}`, oracles);
    this.#isTold = true; // PVE tells QEMU "success", whatever happens next
  }

  async teardown(): Promise<void> {
    await this.#access?.finish(this.#isTold);
    this.#access = undefined;
  }

  async expectSettled(): Promise<void> {
    await this.#ledger.expectSettled();
  }
}

/** A container that is only a directory. */
export class ModelContainer implements ModelGuest {
  readonly type = "lxc";
  readonly vmid: number;
  readonly #node: TestNode;
  readonly #tree: string;
  readonly #points = new Map<string, string>();
  #epoch = 1000;

  private constructor(node: TestNode, vmid: number, tree: string) {
    this.#node = node;
    this.vmid = vmid;
    this.#tree = tree;
  }

  static async create(node: TestNode, vmid: number): Promise<ModelContainer> {
    const tree = path.join(node.dir, `tree-${vmid}`);
    await mkdir(path.join(tree, "sbin"), { recursive: true });
    for (let n = 0; n < 10; n++) await writeFile(path.join(tree, `file${n}`), `${n}`.repeat(n * 1000));
    return new ModelContainer(node, vmid, tree);
  }

  takeEpoch(): number {
    return this.#epoch++;
  }

  get takenEpoch(): number {
    return epochOf([...this.#points.keys()].at(-1));
  }

  async archive(hooks: Hooks, archiveName: string, death: Death): Promise<void> {
    const { vmid } = this;
    const text = `${archiveName} ${death}`;
    await writeFile(path.join(this.#tree, "when"), text);
    await hooks.prepare(vmid, this.#tree);
    if (death === "after prepare") throw new Died(death);
    if (death === "child killed") return; // PVE takes that for a success
    const tree = death === "copy" ? path.join(this.#tree, "missing") : this.#tree;
    const isSignal = death === "signal in mid-copy";
    const options = isSignal ? { bandwidthLimit: 1000, interrupt: untilCopying(this.#node, vmid, "archive.tar") } : {};
    await hooks.backupContainer(vmid, tree, options).catch((error: Error) => {
      throw death === "copy" ? new Died(error.message) : error;
    });
    this.#points.set(`backup/${archiveName}`, text);
  }

  async teardown(): Promise<void> {}

  async expectSettled(): Promise<void> {
    expect(new Set(await list(this.#node, this.vmid))).toEqual(new Set(this.#points.keys()));
    const names = await readdir(path.join(this.#node.storePath, String(this.vmid))).catch((): string[] => []);
    expect(names.filter((name) => !/^(lxc-[0-9]+|state\.json|failed)$/.test(name))).toEqual([]);
    const runDir = path.join(this.#node.root, "run/pve-backup-host");
    expect(await readdir(runDir).catch((): string[] => [])).toEqual([]);
  }

  /** By GNU tar: every archive matches its backup, and the newest holds the files as they are. */
  async expectAllRight(): Promise<void> {
    await this.expectSettled();
    let archive = "";
    for (const [volname, text] of this.#points) {
      archive = path.join(this.#node.storePath, volname.replace(/^backup\//, ""), "archive.tar");
      expect(await runTool("tar", ["xOf", archive, "./when"]), volname).toBe(text);
    }
    await runTool("tar", ["df", archive, "-C", this.#tree, "--exclude=when", "./sbin", "./file0", "./file9"]);
  }
}

const epochOf = (volname: string | undefined): number => Number(volname?.split("-").at(-1));
