// SPDX-License-Identifier: AGPL-3.0-or-later
// A store that others write to, beside a directory of the node that they must not reach through us, and the checks of
// what a job did: one sentence or success, nothing of the node touched or shown, and what is listed restores right.
// biome-ignore assist/source/organizeImports: it must come before the product
import { faultSwitch } from "../fault/fault-fs.ts";
import { execFileSync } from "node:child_process";
import {
  closeSync,
  constants,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { expect, type TestContext } from "vitest";
import { compareImages, runTool, seededBytes } from "../../../fixtures/lab/index.ts";
import type { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import type { VmVolume } from "../../../src/provider/index.ts";
import { BareDisk } from "../vm/bare-disk.ts";
import { TestNode } from "../node/test-node.ts";
import { sentenceOf } from "../fault/fault-rules.ts";
import { type Place, ShareAttacker } from "./share-attacker.ts";
import { HostCanaries, SECRET } from "./share-host.ts";
import { requireTool } from "../programs/tools.ts";

export const VM = 100;
export const CT = 101;
export const DISK = "drive-scsi0";
export const NEVER = new AbortController().signal;
const DISK_BYTES = 640 * 1024;
/** Far above what a job takes: it ends what hangs. */
const HANG_MS = 20_000;
/** Beats are so rare that they do not shift the count of calls; dead hosts are watched for moments only. */
const TIMING = { heartbeatMs: 5_000, staleMs: 12_000, observeMs: 120 };

export interface Outcome {
  /** The one sentence; undefined for a success. */
  readonly message: string | undefined;
  readonly attacker: ShareAttacker;
}

export type Job = (provider: DirectoryProvider) => Promise<unknown>;

export class ShareSite extends TestNode {
  host: HostCanaries;
  readonly disk: BareDisk;
  /** What each point must restore to: a raw file, or the archive of a container. */
  readonly oracles = new Map<string, string>();
  /** The timing of the locks. */
  timing = TIMING;
  /** As the disk, with its bitmap frozen, is backed up incrementally. */
  reuse: VmVolume | undefined;

  private constructor(dir: string, disk: BareDisk) {
    super(dir, { "dir-compression": "none" });
    this.host = HostCanaries.none(path.join(dir, "host"));
    this.disk = disk;
  }

  /** @param prepare makes the points with which the store begins */
  static async start(context: TestContext, prepare: (site: ShareSite) => Promise<void>): Promise<ShareSite> {
    requireTool(context, "mount", "umount", "mkfifo", "qemu-img", "qemu-storage-daemon");
    const dir = mkdtempSync(path.join(tmpdir(), "pbh-share-"));
    try {
      execFileSync("mount", ["-t", "tmpfs", "-o", "size=256m,strictatime", "tmpfs", dir], { stdio: "pipe" });
    } catch (error) {
      rmSync(dir, { recursive: true });
      if (process.env.REQUIRE_TOOLS === "1") throw error;
      console.info(`skipped: ${context.task.name}: needs to mount, which is not allowed here`);
      context.skip("needs to mount, which is not allowed here");
    }
    const disk = await BareDisk.start(path.join(dir, "disk"), DISK, seededBytes("share", DISK_BYTES));
    await runTool("cp", [disk.file, path.join(dir, "oracle-1000.raw")]);
    const site = new ShareSite(dir, disk);
    try {
      for (const name of ["root/etc/pve/qemu-server", "aside"]) mkdirSync(path.join(dir, name));
      execFileSync("mkfifo", [path.join(dir, "pipe")]);
      writeFileSync(path.join(dir, "root/etc/pve/qemu-server/100.conf"), guestConfig(0));
      await prepare(site);
      await site.#begin();
      return site;
    } catch (error) {
      await site[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Keeps the store as `prepare` has left it, and makes the canaries. */
  async #begin(): Promise<void> {
    for (const name of ["store", "root"]) await runTool("cp", ["-a", `${this.dir}/${name}`, `${this.dir}/${name}.0`]);
    this.log.length = 0;
    this.restoreHost();
  }

  get place(): Place {
    const { dir, host, storePath: store } = this;
    return { store, host, aside: path.join(dir, "aside"), pipe: path.join(dir, "pipe") };
  }

  override provider(scfg: Record<string, unknown> = {}): DirectoryProvider {
    return super.provider(scfg, { lockTiming: this.timing });
  }

  /** The store and its records as they were after `prepare`. */
  reset(): void {
    for (const name of ["store", "root", "aside"]) rmSync(path.join(this.dir, name), { recursive: true, force: true });
    for (const name of ["store", "root"]) execFileSync("cp", ["-a", `${this.dir}/${name}.0`, `${this.dir}/${name}`]);
    mkdirSync(path.join(this.dir, "aside"));
    this.log.length = 0;
  }

  /** The node's own files as they were in the beginning: a copy of the store with other contents, and more. */
  restoreHost(): void {
    const folder = path.join(this.dir, "host");
    rmSync(folder, { recursive: true, force: true });
    execFileSync("cp", ["-r", path.join(this.dir, "store.0"), folder]);
    this.host = HostCanaries.create(folder);
  }

  /** The calls that an undisturbed job makes below the store. */
  async dryRun(job: Job): Promise<ShareAttacker> {
    this.reset();
    const { attacker, message } = await this.attack(job, new ShareAttacker(this.place));
    expect(message, this.log.join("\n")).toBeUndefined();
    expect(this.log.filter((line) => line.startsWith("warn"))).toEqual([]);
    return attacker;
  }

  /** One job under attack, with every check except that of the points. */
  async attack(job: Job, attacker: ShareAttacker, isUndone = false): Promise<Outcome> {
    this.host.look();
    faultSwitch.arm([this.storePath]);
    attacker.start();
    let message: string | undefined;
    let output: unknown;
    try {
      await using provider = this.provider();
      output = await this.#unlessItHangs(job(provider));
    } catch (error) {
      if (error instanceof HangError) throw error;
      message = sentenceOf(error);
    } finally {
      attacker.stop(isUndone);
      faultSwitch.disarm();
    }
    this.expectNoSecret("output", output);
    this.expectNoSecret("log and error", [...this.log, message]);
    for (const line of this.log) expect(line).toMatch(/^(info|warn): [A-Za-z"][^\n]*[^:\s]$/);
    expect(this.log.join("\n")).not.toMatch(/undefined|\[object|Error:| {4}at /);
    this.host.expectUntouched();
    return { attacker, message };
  }

  async #unlessItHangs(work: Promise<unknown>): Promise<unknown> {
    const hang = new AbortController();
    const result = await Promise.race([
      work,
      sleep(HANG_MS, "hangs", { signal: hang.signal }).catch(() => undefined),
    ]).finally(() => hang.abort());
    if (result !== "hangs") return result;
    // A process that waits at the pipe for its other end goes on now.
    const end = openSync(this.place.pipe, constants.O_RDWR | constants.O_NONBLOCK);
    await Promise.race([work.catch(() => undefined), sleep(1_000)]);
    closeSync(end);
    throw new HangError(`it hangs\n${this.log.join("\n")}`);
  }

  expectNoSecret(what: string, output: unknown): void {
    const text = JSON.stringify(output, (_, value) =>
      value instanceof Map ? [...value] : value?.type === "Buffer" ? Buffer.from(value.data).toString("latin1") : value,
    );
    expect(text ?? "", what).not.toContain(SECRET);
  }

  /** After the attack: every listed point restores to what it was, or is refused in one sentence. */
  async expectPointsRight(): Promise<{ right: number; refused: number }> {
    const found = { right: 0, refused: 0 };
    this.host.look();
    await using provider = this.provider();
    for (const vmid of [VM, CT]) {
      const listed = await provider.storage.listVolumes(vmid, NEVER).catch((error: unknown) => {
        sentenceOf(error);
        return [];
      });
      this.expectNoSecret("list", listed);
      for (const { volname } of listed) {
        try {
          if (vmid === VM) await this.#expectVm(provider, volname);
          else await this.#expectContainer(provider, volname);
          found.right++;
        } catch (error) {
          if (!isHostError(error)) throw error;
          sentenceOf(error);
          found.refused++;
        }
      }
    }
    this.expectNoSecret("log", this.log);
    this.host.expectUntouched();
    return found;
  }

  async #expectVm(provider: DirectoryProvider, volname: string): Promise<void> {
    const oracle = this.oracles.get(volname);
    if (oracle === undefined) throw new Error(`${volname} is listed, and nobody made it`);
    const devices = await provider.restore.restoreVmInit(volname, NEVER);
    try {
      expect((await provider.restore.archiveGetGuestConfig(volname, NEVER)).toString()).toBe(
        guestConfig(this.epochOf(volname)),
      );
      const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(volname, DISK, NEVER);
      const raw = readFileSync(qemuImgPath);
      expect(raw.equals(readFileSync(oracle)), `disk of ${volname}`).toBe(true);
      expect([...devices]).toEqual([[DISK, { size: DISK_BYTES }]]);
    } finally {
      await provider.restore.restoreVmCleanup(volname);
    }
  }

  async #expectContainer(provider: DirectoryProvider, volname: string): Promise<void> {
    const oracle = this.oracles.get(volname);
    if (oracle === undefined) throw new Error(`${volname} is listed, and nobody made it`);
    const offer = await provider.restore.restoreContainerInit(volname, NEVER);
    try {
      expect(await provider.restore.archiveGetGuestConfig(volname, NEVER)).toEqual(CT_CONFIG);
      const { tarPath } = offer as { tarPath?: string };
      if (tarPath === undefined) throw new Error("no tar archive is on offer");
      expect(readFileSync(tarPath).equals(readFileSync(oracle)), `archive of ${volname}`).toBe(true);
    } finally {
      await provider.restore.restoreContainerCleanup(volname);
    }
  }

  epochOf = (volname: string): number => Number(volname.replace(/.*-/, ""));

  /** Bit for bit, by stock qemu-img on the store's own files. */
  async expectImage(volname: string): Promise<void> {
    const image = path.join(this.storePath, volname.replace("backup/", ""), `${DISK}.qcow2`);
    expect(await compareImages(image, "qcow2", this.oracles.get(volname) ?? "", "raw")).toMatchObject({
      identical: true,
    });
  }

  /** Names in the guest's directory. */
  names = (vmid: number, folder = ""): string[] => readdirSync(path.join(this.storePath, String(vmid), folder)).sort();

  override async [Symbol.asyncDispose](): Promise<void> {
    faultSwitch.disarm();
    await this.disk[Symbol.asyncDispose]();
    await runTool("umount", ["--lazy", this.dir]);
    await super[Symbol.asyncDispose]();
  }
}

class HangError extends Error {}

const isHostError = (error: unknown): boolean => typeof (error as { code?: unknown }).code === "string";

export const guestConfig = (epoch: number): string =>
  `name: vm-${epoch}\nmemory: 512\nvmgenid: 11111111-2222-3333-4444-555555555555\n`;
export const CT_CONFIG = Buffer.from("hostname: a-container\n# with a comment that is long enough to be overwritten\n");
