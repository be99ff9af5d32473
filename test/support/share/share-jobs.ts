// SPDX-License-Identifier: AGPL-3.0-or-later
// Jobs on a share that others write to, in PVE's order of calls, and all attacks on one of them.
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import { runTool, SeededRandom, seededBytes } from "../../../fixtures/lab/index.ts";
import { EnvironmentError } from "../../../src/core/index.ts";
import type { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import { handoffOf } from "../container/archiver.ts";
import { takeHandoff } from "../container/take-handoff.ts";
import type { NamedCall } from "../fault/fault-fs.ts";
import { isFull } from "../fault/full-matrix.ts";
import { type Attack, namesOf, PLANTS, ShareAttacker } from "./share-attacker.ts";
import { CT, CT_CONFIG, DISK, guestConfig, type Job, NEVER, type ShareSite, VM } from "./share-site.ts";

const FIREWALL = Buffer.from("[OPTIONS]\nenable: 1\n");

/**
 * A whole backup of the VM, with notes and protection. After a failure come PVE's cleanup, and the log of the failed
 * job.
 */
export function vmBackup(site: ShareSite, epoch: number, mode: "full" | "incremental" = "full"): Job {
  return async (provider) => {
    const taskLog = path.join(site.dir, "task.log");
    writeFileSync(taskLog, "INFO: task log\n");
    const volname = `backup/${VM}/qemu-${epoch}`;
    try {
      await provider.backup.jobInit();
      await provider.backup.backupInit(VM, "qemu", epoch, NEVER);
      const sizes = new Map([[DISK, { size: site.disk.sizeBytes }]]);
      const modes = mode === "full" ? new Map() : await provider.backup.backupVmQueryIncremental(VM, sizes, NEVER);
      const volume = modes.get(DISK) === "use" ? site.reuse : site.disk.volume("none");
      const volumes = new Map([[DISK, volume ?? site.disk.volume("none")]]);
      const info = { bandwidthLimit: 0, firewallConfig: FIREWALL };
      // A job may fail when its point is already complete: then the point must hold that content, too.
      await runTool("cp", [site.disk.file, oracleOf(site, epoch)]);
      site.oracles.set(volname, oracleOf(site, epoch));
      await provider.backup.backupVm(VM, Buffer.from(guestConfig(epoch)), volumes, info, NEVER);
      await provider.storage.updateVolumeAttribute(volname, "notes", "a note", NEVER);
      await provider.storage.updateVolumeAttribute(volname, "protected", 1, NEVER);
      await provider.backup.backupCleanup(VM, "qemu", true, undefined, NEVER);
      return volname;
    } catch (error) {
      await provider.backup.backupCleanup(VM, "qemu", false, "it failed", NEVER);
      throw error;
    } finally {
      await provider.backup.backupHandleLogFile(VM, taskLog);
      await provider.backup.jobCleanup(NEVER);
    }
  };
}

/** The same for a container; the test plays its archiver. */
export function containerBackup(site: ShareSite, epoch: number): Job {
  return async (provider) => {
    const taskLog = path.join(site.dir, "task.log");
    writeFileSync(taskLog, "INFO: task log\n");
    const archive = path.join(site.dir, "archive.made");
    if (!existsSync(archive)) await makeArchive(site, archive);
    try {
      await provider.backup.jobInit();
      await provider.backup.backupInit(CT, "lxc", epoch, NEVER);
      site.oracles.set(`backup/${CT}/lxc-${epoch}`, archive);
      const info = { directory: site.dir, sources: ["./"], backupUserId: 100_000, bandwidthLimit: 0 };
      const handoff = handoffOf(
        await provider.backup.backupContainerPrepare(CT, { ...info, firewallConfig: FIREWALL }, NEVER),
      );
      using channel = await takeHandoff(handoff.socketPath, handoff.token);
      await runTool("sh", ["-c", 'cat "$1" > "$2"', "-", archive, handoff.archivePath]);
      channel.send({ commit: { files: 13, bytes: 100, warnings: 0, "guest-config": CT_CONFIG.toString("base64") } });
      for (;;) {
        const answer = await channel.next();
        if (answer !== undefined && "log" in answer) continue;
        if (answer?.ok !== true)
          throw new EnvironmentError((answer?.error as Error | undefined)?.message ?? "Cannot hear an answer");
        break;
      }
      await provider.backup.backupCleanup(CT, "lxc", true, undefined, NEVER);
      return handoff;
    } catch (error) {
      await provider.backup.backupCleanup(CT, "lxc", false, "it failed", NEVER);
      throw error;
    } finally {
      await provider.backup.backupHandleLogFile(CT, taskLog);
      await provider.backup.jobCleanup(NEVER);
    }
  };
}

/** With what pct expects of an archive: a directory sbin, and ten members. */
async function makeArchive(site: ShareSite, archive: string): Promise<void> {
  const tree = path.join(site.dir, "tree");
  mkdirSync(path.join(tree, "sbin"), { recursive: true });
  for (let n = 0; n < 12; n++) writeFileSync(path.join(tree, `file-${n}`), seededBytes(n, 8 * 1024));
  await runTool("tar", ["cf", archive, "-C", tree, "."]);
}

/** A restore of the VM as qmrestore does it. @returns everything that it gets to see */
export function vmRestore(volname: string): Job {
  return async (provider) => {
    const output: unknown[] = [await provider.restore.restoreGetMechanism(volname, NEVER)];
    try {
      output.push(await provider.restore.restoreVmInit(volname, NEVER));
      output.push(await provider.restore.archiveGetGuestConfig(volname, NEVER));
      output.push(await provider.restore.archiveGetFirewallConfig(volname, NEVER));
      const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(volname, DISK, NEVER);
      output.push((await readFile(qemuImgPath)).toString("latin1"));
      await provider.restore.restoreVmVolumeCleanup(volname, DISK);
    } finally {
      await provider.restore.restoreVmCleanup(volname);
    }
    return output;
  };
}

/** The same for a container: the requester reads the archive. */
export function containerRestore(volname: string): Job {
  return async (provider) => {
    const output: unknown[] = [await provider.restore.restoreGetMechanism(volname, NEVER)];
    try {
      const offer = (await provider.restore.restoreContainerInit(volname, NEVER)) as { tarPath?: string };
      output.push(await provider.restore.archiveGetGuestConfig(volname, NEVER));
      output.push(await provider.restore.archiveGetFirewallConfig(volname, NEVER));
      if (offer.tarPath !== undefined) output.push((await readFile(offer.tarPath)).toString("latin1"));
    } finally {
      await provider.restore.restoreContainerCleanup(volname);
    }
    return output;
  };
}

export const listAll: Job = async (provider: DirectoryProvider) => await provider.storage.listVolumes(undefined, NEVER);

/** Writes and reads the notes and protection of a point, and makes the GUI's requests. */
export function attributes(volname: string): Job {
  return async (provider) => {
    await provider.storage.updateVolumeAttribute(volname, "notes", "another note", NEVER);
    await provider.storage.updateVolumeAttribute(volname, "protected", 1, NEVER);
    const notes = await provider.storage.getVolumeAttribute(volname, "notes", NEVER);
    const isProtected = await provider.storage.getVolumeAttribute(volname, "protected", NEVER);
    return [notes, isProtected, await provider.storage.volumeInfo(volname, NEVER)];
  };
}

/** A job that fails before it copies anything, so that its log is kept. */
export function failedJob(site: ShareSite, epoch: number): Job {
  return async (provider) => {
    const taskLog = path.join(site.dir, "task.log");
    writeFileSync(taskLog, "INFO: task log\n");
    await provider.backup.backupInit(VM, "qemu", epoch, NEVER).catch(() => undefined); // the next call is under test
    await provider.backup.backupCleanup(VM, "qemu", false, "it failed", NEVER);
    await provider.backup.backupHandleLogFile(VM, taskLog);
    await provider.backup.jobCleanup(NEVER);
  };
}

/** Raw copy of the disk at the time of a backup. */
export const oracleOf = (site: ShareSite, epoch: number): string => path.join(site.dir, `oracle-${epoch}.raw`);

/** The store begins with two points: a full one, and one with notes that builds on it. */
export async function withTwoPoints(site: ShareSite): Promise<void> {
  await site.disk.startBitmap(65536);
  for (const [epoch, mode] of [
    [1000, "full"],
    [2000, "incremental"],
  ] as const) {
    await using provider = site.provider();
    if (epoch === 2000) {
      await site.disk.write(128 * 1024, seededBytes("second", 64 * 1024));
      site.reuse = await site.disk.offerBitmap();
    }
    await vmBackup(site, epoch, mode)(provider);
  }
}

interface PlayOptions {
  /** Without FAULT_MATRIX=full: one attack on every so many calls. */
  readonly every?: number;
  /** The points are restored after one attack in so many. */
  readonly restoreEvery?: number;
}

/**
 * Every call, each name in it, each plant; without FAULT_MATRIX=full one attack per chosen call, drawn with a fixed
 * seed.
 */
export async function playAttacks(
  site: ShareSite,
  job: Job,
  { every = 1, restoreEvery = 4 }: PlayOptions = {},
): Promise<void> {
  const { calls } = await site.dryRun(job);
  expect(calls.length).toBeGreaterThan(0);
  const problems: string[] = [];
  let turn = 0;
  for (const attack of attacksOn(site, calls, every)) {
    site.reset();
    const before = new Map(site.oracles);
    try {
      await site.attack(job, new ShareAttacker(site.place, attack), turn % 4 > 1);
      if (isFull || turn % restoreEvery === 0) await site.expectPointsRight();
    } catch (error) {
      const message = (error as Error).message.split("\n").slice(0, 14).join("\n  ");
      problems.push(`${describeAttack(site, calls, attack)}: ${message}`);
      site.restoreHost();
    }
    site.oracles.clear();
    for (const [volname, oracle] of before) site.oracles.set(volname, oracle);
    turn++;
  }
  console.info(`${calls.length} calls, ${turn} attacks, ${problems.length} of them hit`);
  expect(problems.slice(0, 12), `${problems.length} of ${turn} attacks`).toEqual([]);
  site.host.expectSameContent();
}

/** The number of calls after which the original is back. */
const RETURNS = [undefined, 0, 3] as const;

function attacksOn(site: ShareSite, calls: readonly NamedCall[], every: number): Attack[] {
  const attacks: Attack[] = [];
  const random = new SeededRandom(Number(process.env.TEST_SEED ?? 16));
  for (const [call, named] of calls.entries()) {
    if (!isFull && call % every > 0) continue;
    const names = namesOf(site.storePath, named);
    const all = names.flatMap((_, name) => PLANTS.map((plant) => ({ call, name, plant })));
    for (const one of isFull ? all : [all[random.integer(0, all.length - 1)]]) {
      if (one !== undefined) attacks.push({ ...one, backAfter: RETURNS[random.integer(0, RETURNS.length - 1)] });
    }
  }
  return attacks;
}

function describeAttack(site: ShareSite, calls: readonly NamedCall[], attack: Attack): string {
  const { call, plant, backAfter } = attack;
  const { kind = "none", paths = [] } = calls[call] ?? {};
  const names = namesOf(site.storePath, { kind: "look", paths });
  const short = (file = ""): string => file.replace(site.storePath, "");
  const back = backAfter === undefined ? "it stays" : `back ${backAfter} calls later`;
  return `call ${call}, ${kind} ${paths.map(short).join(" ")}: ${plant} as ${short(names[attack.name])}, ${back}`;
}
