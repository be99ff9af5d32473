// SPDX-License-Identifier: AGPL-3.0-or-later
// A VM on the lab, the scripted vzdump and qmrestore with the real bridge, and the checks after each kill: what is
// listed is right, nothing is left, and the next backup is right.
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import {
  compareImages,
  type LabBackup,
  LabControl,
  type LabGuest,
  runTool,
  SeededRandom,
  seededBytes,
} from "../../../fixtures/lab/index.ts";
import type { BridgeBundle } from "../bridge/bridge-process.ts";
import { TestNode } from "../node/test-node.ts";
import { type Program, startScript, watch } from "../programs/scripted-pve.ts";
import { list } from "../vm/vm-job.ts";
import { DISK, DISK_BYTES, MIB, startGuest, untilCopying, VMID } from "../vm/vm-rules.ts";
import { GuestStage } from "./guest-stage.ts";
import { type Walk, walk } from "./kill-stage.ts";

const CLUSTER_BYTES = 64 * 1024;

export const MECHANISMS = ["nbd", "file-handle"] as const;

export interface StageOptions {
  /** How vzdump passes the disks on. */
  readonly mechanism?: (typeof MECHANISMS)[number];
  readonly diskBytes?: number;
}

interface VzdumpOptions {
  readonly args?: readonly string[];
  /** KiB per second; at a low enough rate a copy never ends by itself. */
  readonly bwlimit?: number;
  readonly bundle?: BridgeBundle;
  readonly env?: Readonly<Record<string, string>>;
}

export interface KilledJob extends Walk {
  readonly volname: string;
  /** The job's point is in the store. */
  readonly isListed: boolean;
}

export class VmStage extends GuestStage<KilledJob> {
  readonly node: TestNode;
  readonly guest: LabGuest;
  /** Every point that must exist, with the disks' content at its time. */
  readonly points = new Map<string, ReadonlyMap<string, string>>();
  readonly #bundle: BridgeBundle;
  readonly #mechanism: (typeof MECHANISMS)[number];
  readonly #control: LabControl;
  readonly #random = new SeededRandom(4_711);
  #epoch = 1_000;
  #access: LabBackup | undefined;

  private constructor(
    node: TestNode,
    guest: LabGuest,
    control: LabControl,
    bundle: BridgeBundle,
    mechanism: (typeof MECHANISMS)[number],
  ) {
    super(VMID);
    this.node = node;
    this.guest = guest;
    this.#control = control;
    this.#bundle = bundle;
    this.#mechanism = mechanism;
  }

  /** With one full backup in the store. */
  static async create(
    bundle: BridgeBundle,
    { mechanism = "nbd", diskBytes = DISK_BYTES }: StageOptions = {},
  ): Promise<VmStage> {
    const node = await TestNode.create({ "dir-compression": "none" });
    const guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: diskBytes }] });
    const stage: VmStage = new VmStage(
      node,
      guest,
      await LabControl.open({
        guests: [guest],
        socketPath: path.join(node.dir, "lab.sock"),
        oracleDir: () => path.join(node.dir, `oracle-${stage.#epoch}`),
        onSetup: (access) => {
          stage.#access = access;
        },
      }),
      bundle,
      mechanism,
    );
    await writeFile(path.join(node.dir, "100.conf"), guest.guestConfig);
    expect(await stage.next()).toBe("full: first backup");
    return stage;
  }

  /** Starts a backup of the guest, with fresh writes in it and a second that no other backup has. */
  async vzdump({ args = [], bwlimit, bundle = this.#bundle, env = {} }: VzdumpOptions = {}): Promise<Program> {
    this.#epoch++;
    this.#access = undefined;
    await this.#guestWrites();
    const devices = Object.fromEntries(this.guest.devices);
    const config = path.join(this.node.dir, "100.conf");
    const guests = [{ vmid: VMID, config, "backup-time": this.#epoch, devices }];
    const more = { "lab-socket": path.join(this.node.dir, "lab.sock"), notes: "nightly", guests };
    const job = await this.#writeJob({ ...more, ...(bwlimit === undefined ? {} : { bwlimit }) });
    return this.#start("vzdump.pl", ["--job", job, ...args], bundle, env);
  }

  async qmrestore(
    volname: string,
    target: string,
    args: readonly string[] = [],
    bundle = this.#bundle,
  ): Promise<Program> {
    await mkdir(target, { recursive: true });
    const job = await this.#writeJob({ guests: [] });
    const archive = `${this.node.storeid}:${volname}`;
    const all = ["--job", job, "--archive", archive, "--target", target, ...args];
    return this.#start("qmrestore.pl", all, bundle, {});
  }

  override async judge(walked: Walk): Promise<KilledJob> {
    await this.#control.abandon(VMID);
    await this.expectNoSurvivors();
    if (walked.status === null) await this.#withdrawFiles();
    const volname = `backup/100/qemu-${this.#epoch}`;
    const listed = await list(this.node, VMID);
    const isListed = listed.includes(volname);
    if (isListed) this.points.set(volname, this.#access?.oracles ?? new Map());
    expect(new Set(listed), walked.output).toEqual(new Set(this.points.keys()));
    if (walked.status === 0) expect(isListed, walked.output).toBe(true);
    if (isListed) await this.expectRight(volname);
    return { ...walked, volname, isListed };
  }

  /** The next backup, undisturbed. @returns its mode, as modeOf() says it */
  async next(options: VzdumpOptions = {}): Promise<string> {
    const { output, status, volname } = await this.judge(await walk(await this.vzdump(options)));
    expect(status, output).toBe(0);
    expect(output).not.toMatch(/^(?:WARN|ERROR)/m);
    expect(output).toContain(`using backup mechanism '${this.#mechanism}'`);
    await this.expectRight(volname);
    expect(await this.leftovers()).toEqual([]);
    const full =
      /^INFO: drive-scsi0: full backup of [^(]* \((.*)\)$/m.exec(output)?.[1] ??
      /^INFO: drive-scsi0: incremental backup since "[^"]*", all of .* is read \((.*)\)$/m.exec(output)?.[1];
    const base = /^INFO: drive-scsi0: incremental backup \(.* changed since "(.*)"\)$/m.exec(output)?.[1];
    return full === undefined ? `incremental since ${base}` : `full: ${full}`;
  }

  /** The next backup is right, and builds on the newest existing point: nothing of its bitmap was lost. */
  async expectNextIncremental(cell: string): Promise<void> {
    const newest = [...this.points.keys()].at(-1);
    expect(await this.next(), cell).toBe(`incremental since ${newest}`);
  }

  /** Restored by stock qemu-img alone, the point equals the disk. */
  async expectRight(volname: string): Promise<void> {
    const oracle = this.points.get(volname)?.get(DISK) ?? "no oracle";
    const image = path.join(this.node.storePath, volname.replace("backup/", ""), `${DISK}.qcow2`);
    expect(await compareImages(image, "qcow2", oracle, "raw"), volname).toMatchObject({ identical: true });
  }

  async expectAllRight(): Promise<void> {
    for (const volname of this.points.keys()) await this.expectRight(volname);
  }

  /**
   * A backup of 8 MiB and more at `bwlimit`; `act` is applied to it while the disk is copied. It must not be listed.
   */
  async killInMidCopy(act: (program: Program) => Promise<void> | void, bwlimit: number): Promise<KilledJob> {
    await this.guest.write(DISK, 4 * MIB, seededBytes("mid-copy", 8 * MIB));
    const program = await this.vzdump({ bwlimit });
    await untilCopying(this.node);
    await this.watchProcessesOf(program);
    await act(program);
    const job = await this.judge(await walk(program));
    expect(job.isListed, job.output).toBe(false);
    expect(job.output).not.toMatch(/^INFO: drive-scsi0: 100% /m); // it was in mid-copy
    return job;
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    this.continueHalted();
    await this.#control[Symbol.asyncDispose]();
    await this.guest[Symbol.asyncDispose]();
    await this.node[Symbol.asyncDispose]();
  }

  /**
   * Nothing cleans up the files of a vzdump that was killed with -9: they are removed as an administrator would do
   * it.
   */
  async #withdrawFiles(): Promise<void> {
    const mounts = (await readFile("/proc/self/mounts", "utf8")).split("\n").map((line) => line.split(" ")[1] ?? "");
    for (const mount of mounts.filter((one) => one.startsWith(`${this.guest.dir}/`))) {
      await runTool("fusermount3", ["-u", mount]);
      await rm(mount, { recursive: true });
    }
  }

  async #guestWrites(): Promise<void> {
    const length = this.#random.integer(1, 16) * CLUSTER_BYTES;
    const offset = this.#random.integer(0, (DISK_BYTES - MIB) / 512) * 512;
    await this.guest.write(DISK, offset, seededBytes(this.#epoch, length));
  }

  async #writeJob(job: object): Promise<string> {
    const { node } = this;
    const file = path.join(node.dir, "job.json");
    const scfg = {
      path: node.storePath,
      content: "backup",
      "vm-backup-mode": "incremental",
      "vm-backup-mechanism": this.#mechanism,
      "dir-compression": "none",
    };
    await writeFile(file, JSON.stringify({ storeid: node.storeid, scfg, "log-dir": node.dir, ...job }));
    return file;
  }

  #start(script: string, args: readonly string[], bundle: BridgeBundle, env: Record<string, string>): Program {
    return watch(startScript(script, args, { bridge: bundle.path, root: this.node.root, env }));
  }
}
