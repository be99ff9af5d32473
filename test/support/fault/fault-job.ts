// SPDX-License-Identifier: AGPL-3.0-or-later
// Whole backups of one VM with a fault somewhere, and what must hold after each: only complete points are listed,
// each restores bit for bit, nothing is left behind for good, one clear sentence gives the reason, and the next
// backup is right.
// biome-ignore assist/source/organizeImports: it must come before the product
import { type Fault, type Operation, faultSwitch } from "./fault-fs.ts";
import { rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import { LabGuest, SeededRandom, compareImages, seededBytes, type LabBackup } from "../../../fixtures/lab/index.ts";
import { age, leftBelow, MemoryFolder } from "./fault-folder.ts";
import { sentenceOf } from "./fault-rules.ts";
import { list } from "../vm/vm-job.ts";
import { TestNode } from "../node/test-node.ts";
import { expectRestores, never } from "../vm/vm-rules.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
const VMID = 100;
const DISKS = ["drive-scsi0", "drive-scsi1"] as const;
const DISK_BYTES = 8 * MIB;
/** Above this the points are removed and a full one starts again: comparing long chains takes its time. */
export const MOST_POINTS = 6;

export interface Cell {
  /** The error that the job ended with; undefined if it succeeded. */
  readonly error: unknown;
  readonly volname: string;
  readonly isCommitted: boolean;
  readonly modes: ReadonlyMap<string, "new" | "use">;
  readonly log: readonly string[];
  /** What failed first; undefined if the job ended before the fault. */
  readonly fired: Operation | undefined;
  readonly operations: readonly Operation[];
}

/** A node with a store, a running VM with two small disks, and the points that must exist. */
export class FaultSite implements AsyncDisposable {
  readonly node: TestNode;
  readonly guest: LabGuest;
  /** Every point that must exist, with raw copies of its disks. */
  readonly points = new Map<string, ReadonlyMap<string, string>>();
  /** What the guest has written, as the test itself recorded it. */
  readonly #disks = new Map<string, Buffer>(DISKS.map((device) => [device, Buffer.alloc(DISK_BYTES)]));
  /** Of the newest point. */
  chainLength = 0;
  readonly #memory: MemoryFolder;
  readonly #random = new SeededRandom(44);
  #epoch = 1000;

  private constructor(node: TestNode, guest: LabGuest, memory: MemoryFolder) {
    this.node = node;
    this.guest = guest;
    this.#memory = memory;
  }

  static async create(scfg: Record<string, unknown>): Promise<FaultSite> {
    const memory = await MemoryFolder.mount();
    const node = await memory.use(() => TestNode.create(scfg));
    const disks = DISKS.map((device) => ({ device, sizeBytes: DISK_BYTES }));
    const options = { dir: `${node.dir}/vm`, root: node.root, vmid: VMID, storeid: node.storeid, disks };
    const guest = await LabGuest.start(options);
    const site = new FaultSite(node, guest, memory);
    for (const device of DISKS) await site.write(device, MIB, seededBytes(device, 512 * KIB));
    return site;
  }

  /** The store, the place of the witness, and the directory for mounts. */
  get folders(): string[] {
    return [this.node.storePath, this.witnesses, this.runDir];
  }

  get runDir(): string {
    return path.join(this.node.root, "run/pve-backup-host");
  }

  get witnesses(): string {
    return path.join(this.node.root, "etc/pve/priv/pve-backup-host");
  }

  get newest(): string {
    return [...this.points.keys()].at(-1) ?? "none";
  }

  /** Writes for the guest; the test remembers it. */
  async write(device: string, offset: number, bytes: Buffer): Promise<void> {
    bytes.copy(this.#disks.get(device) ?? bytes, offset);
    const isZero = bytes.every((byte) => byte === 0);
    if (isZero) await this.guest.writeZeroes(device, offset, bytes.length);
    else await this.guest.write(device, offset, bytes);
  }

  /** The guest writes here and there, vzdump runs, and `fault` happens during it. Never rejects, as in PVE. */
  async job(fault?: Fault): Promise<Cell> {
    const device = DISKS[this.#random.integer(0, 1)] ?? DISKS[0];
    const offset = this.#random.integer(0, DISK_BYTES / 4096 - 32) * 4096;
    await this.write(device, offset, seededBytes(this.#epoch, 128 * KIB));
    await this.write(device, this.#random.integer(0, 100) * 4096, Buffer.alloc(64 * KIB));
    return await this.vzdump(fault);
  }

  /** job() without the guest. */
  async vzdump(fault?: Fault): Promise<Cell> {
    const { guest, node } = this;
    const epoch = this.#epoch++;
    const taskLog = path.join(node.dir, "task.log");
    await writeFile(taskLog, "INFO: task log\n");
    const logStart = node.log.length;
    faultSwitch.arm(this.folders, fault);
    const done = await runJob(node, guest, { epoch, taskLog }).finally(() => faultSwitch.disarm());
    const volname = `backup/${VMID}/qemu-${epoch}`;
    if (done.isCommitted) {
      this.points.set(volname, await this.#copyDisks(epoch));
      this.chainLength = [...done.modes.values()].includes("use") ? this.chainLength + 1 : 1;
    }
    const { fired, operations } = faultSwitch;
    return { ...done, volname, log: node.log.slice(logStart), fired, operations: [...operations] };
  }

  /** What must hold after every cell. @returns what is left behind for the next backup to sweep */
  async expectWhole({ error, isCommitted, log, volname }: Cell): Promise<string[]> {
    for (const line of log) expect(line).toMatch(/^(info|warn): [A-Za-z"][^\n]*[^:\s]$/);
    expect(log.join("\n")).not.toMatch(/undefined|\[object|injected|Error:| {4}at /);
    if (error !== undefined) sentenceOf(error);
    expect(new Set(await list(this.node, VMID)), `${volname} in the listing`).toEqual(new Set(this.points.keys()));
    if (isCommitted) await this.expectPoint(volname);
    return await leftBelow(this.folders);
  }

  /** Compares the files in the store, read by qemu-img alone, with copies of the disks at the time of the backup. */
  async expectPoint(volname: string): Promise<void> {
    const folder = path.join(this.node.storePath, volname.replace("backup/", ""));
    const compare = async ([device, oracle]: [string, string]): Promise<void> => {
      const compared = await compareImages(oracle, "raw", path.join(folder, `${device}.qcow2`), "qcow2");
      expect(compared, `${volname} ${device}`).toMatchObject({ identical: true });
    };
    await Promise.all([...(this.points.get(volname) ?? [])].map(compare));
  }

  /**
   * A backup without a fault: it succeeds, is right, and sweeps what was left; then everything restores.
   * | @param how "all": every point, as PVE restores it; "it": only this one, by qemu-img on the store
   */
  async expectNextBackup(how: "all" | "it"): Promise<Cell> {
    await age(await leftBelow(this.folders));
    const next = await this.job();
    expect(next.error, next.log.join("\n")).toBeUndefined();
    expect(next.log.filter((line) => line.startsWith("warn"))).toEqual([]);
    expect(await this.expectWhole(next)).toEqual([]);
    if (how === "all") {
      await expectRestores(this.node, ...[...this.points].map(([volname, oracles]) => ({ volname, oracles })));
      expect(await leftBelow(this.folders)).toEqual([]);
    }
    return next;
  }

  /** A first backup, in a new chain; from time to time in an empty store. @returns the job */
  async startAgain(): Promise<Cell> {
    await rm(this.witnesses, { recursive: true, force: true });
    if (this.points.size > MOST_POINTS) {
      await rm(path.join(this.node.storePath, String(VMID)), { recursive: true });
      for (const oracles of this.points.values()) for (const file of oracles.values()) await rm(file);
      this.points.clear();
    }
    const first = await this.job();
    expect(first.error, first.log.join("\n")).toBeUndefined();
    return first;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    faultSwitch.disarm();
    await this.guest[Symbol.asyncDispose]();
    await this.node[Symbol.asyncDispose]();
    await this.#memory[Symbol.asyncDispose]();
  }

  async #copyDisks(epoch: number): Promise<Map<string, string>> {
    const copies = new Map<string, string>();
    for (const [device, bytes] of this.#disks) {
      copies.set(device, path.join(this.node.dir, `${device}-${epoch}.raw`));
      await writeFile(copies.get(device) ?? "", bytes);
    }
    return copies;
  }
}

/** PVE's calls in PVE's order; notes and protection come from a separate process. */
async function runJob(
  node: TestNode,
  guest: LabGuest,
  { epoch, taskLog }: { readonly epoch: number; readonly taskLog: string },
): Promise<Pick<Cell, "error" | "isCommitted" | "modes">> {
  const { vmid } = guest;
  await using provider = node.provider();
  let access: LabBackup | undefined;
  let modes: ReadonlyMap<string, "new" | "use"> = new Map();
  let isCommitted = false;
  let failure: unknown;
  try {
    await provider.backup.jobInit();
    await provider.backup.backupInit(vmid, "qemu", epoch, never);
    modes = await provider.backup.backupVmQueryIncremental(vmid, guest.devices, never);
    access = await guest.openBackup({ modes });
    const info = { bandwidthLimit: 0, firewallConfig: Buffer.from("[OPTIONS]\nenable: 1\n") };
    await provider.backup.backupVm(vmid, Buffer.from(guest.guestConfig), access.vmVolumes(), info, never);
    isCommitted = true;
    await access.finish(true);
    await using attributes = node.provider();
    const volname = `backup/${vmid}/qemu-${epoch}`;
    await attributes.storage.updateVolumeAttribute(volname, "notes", `of ${epoch}`, never);
    await attributes.storage.updateVolumeAttribute(volname, "protected", 1, never);
    await provider.backup.backupCleanup(vmid, "qemu", true, undefined, never);
  } catch (error) {
    failure = error;
    await access?.finish(isCommitted);
    await provider.backup.backupCleanup(vmid, "qemu", false, (error as Error).message, never);
  }
  await provider.backup.backupHandleLogFile(vmid, taskLog);
  await provider.backup.jobCleanup(never);
  return { error: failure, isCommitted, modes };
}
