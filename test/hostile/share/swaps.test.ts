// SPDX-License-Identifier: AGPL-3.0-or-later
// Swaps at the moments that matter most: in the middle of a removal, of a copy and of a commit, under a lock that is
// held, and between the check of an image and its serving.
import { copyFileSync, cpSync, mkdirSync, renameSync, symlinkSync, utimesSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { runTool } from "../../../fixtures/lab/index.ts";
import { type NamedCall, onNamedCall } from "../../support/fault/fault-fs.ts";
import { PLANTS, ShareAttacker } from "../../support/share/share-attacker.ts";
import { failedJob, oracleOf, vmBackup, vmRestore, withTwoPoints } from "../../support/share/share-jobs.ts";
import { DISK, type Job, NEVER, type Outcome, ShareSite, VM } from "../../support/share/share-site.ts";

const OLD = new Date(Date.now() - 3 * 24 * 60 * 60 * 1000);
const guestOf = (site: ShareSite): string => path.join(site.storePath, String(VM));

/** Does something once, right before the first call that `is` is true for, or the nth of them. */
class OneMoment extends ShareAttacker {
  isOver = false;
  readonly #is: (call: NamedCall) => boolean;
  readonly #act: (file: string) => void;
  #rest: number;

  constructor(site: ShareSite, is: (call: NamedCall) => boolean, act: (file: string) => void, skip = 0) {
    super(site.place);
    this.#is = is;
    this.#act = act;
    this.#rest = skip;
  }

  override start(): void {
    onNamedCall((call) => {
      if (this.isOver || !this.#is(call) || this.#rest-- > 0) return;
      this.isOver = true;
      this.#act(call.paths[0] ?? "");
    });
  }
}

describe("a removal of leftovers", () => {
  it.for([0, 1, 2, 3, 4])("does not leave a folder that becomes a link before look %i at it", async (skip, context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    for (const name of [".trash-1", ".staging-1"]) {
      site.reset();
      const folder = path.join(guestOf(site), name, "qemu-1000");
      mkdirSync(folder, { recursive: true });
      for (const file of ["guest.conf", "manifest.json"]) writeFileSync(path.join(folder, file), "a leftover");
      const isAtFolder = ({ paths }: NamedCall): boolean =>
        paths[0] === folder || paths[0]?.startsWith(`${folder}/`) === true;
      const swap = (): void => {
        renameSync(folder, path.join(site.dir, "aside/folder"));
        symlinkSync(path.join(site.host.path, "100/qemu-1000"), folder);
      };
      await site.attack(failedJob(site, 3000), new OneMoment(site, isAtFolder, swap, skip));
      site.host.expectSameContent();
    }
  });

  it("leaves a folder of the node alone that became the guest's folder", async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    const trash = path.join(guestOf(site), ".trash-x");
    mkdirSync(trash);
    utimesSync(trash, OLD, OLD);
    const swap = (): void => {
      renameSync(guestOf(site), path.join(site.dir, "aside/guest"));
      symlinkSync(path.join(site.host.path, "100"), guestOf(site));
    };
    await site.attack(failedJob(site, 3000), new OneMoment(site, ({ paths }) => paths[0] === trash, swap));
    site.host.expectSameContent();
  });
});

describe("a staging folder that is swapped", () => {
  it.for<[string, (call: NamedCall) => boolean]>([
    ["before the image is made", ({ kind, paths }) => kind === "create" && paths[0]?.endsWith(".qcow2") === true],
    [
      "before the manifest is written",
      ({ kind, paths }) => kind === "create" && paths[0]?.endsWith("manifest.json") === true,
    ],
    ["before the commit", ({ kind, paths }) => kind === "rename" && /\.staging-[^/]*$/.test(paths[0] ?? "")],
  ])("makes no point of what the job did not write: %s", { timeout: 120_000 }, async ([, is], context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    for (const plant of [...PLANTS, "another point", "another file in it"] as const) {
      site.reset();
      site.oracles.delete("backup/100/qemu-3000");
      const act = (file: string): void => {
        const folder = file.replace(/(\.staging-[^/]*).*/, "$1");
        if (plant === "another file in it") {
          writeFileSync(path.join(folder, "more.conf"), "not of this job");
          return;
        }
        const kept = path.join(site.dir, "aside/staging");
        renameSync(folder, kept);
        if (plant === "another point") cpSync(path.join(guestOf(site), "qemu-1000"), folder, { recursive: true });
        else new ShareAttacker(site.place).plant(folder, plant, kept);
      };
      const moment = new OneMoment(site, is, act);
      const outcome: Outcome = await site.attack(vmBackup(site, 3000), moment);
      expect(moment.isOver, plant).toBe(true);
      await site.expectPointsRight();
      const isListed = site.names(VM).includes("qemu-3000");
      // With its own folder held by a descriptor the job may go on in it; but it never ends well without it in place.
      expect(outcome.message === undefined && !isListed, `${plant} ended well, and there is no point`).toBe(false);
      if (outcome.message === undefined) await site.expectImage("backup/100/qemu-3000");
    }
  });
});

describe("the lock of a guest", () => {
  it.for(PLANTS)("may become anything while it is held: %s", async (plant, context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    site.reset();
    site.timing = { heartbeatMs: 20, staleMs: 1_000, observeMs: 120 };
    const attacker = new ShareAttacker(site.place);
    const job: Job = async (provider) => {
      await provider.backup.backupInit(VM, "qemu", 3000, NEVER);
      attacker.swap(path.join(guestOf(site), ".lock"), plant);
      await sleep(300); // some beats
      const volumes = new Map([[DISK, site.disk.volume("none")]]);
      try {
        await provider.backup.backupVm(
          VM,
          Buffer.from("name: vm\n"),
          volumes,
          { bandwidthLimit: 0, firewallConfig: undefined },
          NEVER,
        );
      } finally {
        await provider.backup.backupCleanup(VM, "qemu", false, "it failed", NEVER);
      }
    };
    const { message } = await site.attack(job, attacker);
    expect(message).toMatch(/lock/);
    site.host.expectSameContent();
  });
});

describe("an image with an external data file", () => {
  it("is never served, whenever it takes the place of one that was checked", { timeout: 300_000 }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    const forged = path.join(site.dir, "forged.qcow2");
    const options = `data_file=${site.host.disk},data_file_raw=on`;
    await runTool("qemu-img", ["create", "-q", "-f", "qcow2", "-o", options, forged, String(site.disk.sizeBytes)]);
    site.restoreHost(); // qemu-img has emptied the file
    for (const name of ["qemu-2000", "qemu-1000"]) {
      const image = path.join(guestOf(site), name, `${DISK}.qcow2`);
      const isAtImage = ({ paths }: NamedCall): boolean => paths[0] === image;
      const put = (): void => {
        copyFileSync(forged, `${image}.new`);
        renameSync(`${image}.new`, image);
      };
      for (let skip = 0, isOver = true; isOver; skip++) {
        site.reset();
        const moment = new OneMoment(site, isAtImage, put, skip);
        await site.attack(vmRestore("backup/100/qemu-2000"), moment);
        isOver = moment.isOver;
      }
      site.reset();
      await site.attack(restoreWith("backup/100/qemu-2000", put), new ShareAttacker(site.place));
    }
  });

  it("is never the base of a backup", async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    site.reset();
    const options = `data_file=${site.host.disk},data_file_raw=on`;
    const forged = path.join(site.dir, "forged.qcow2");
    await runTool("qemu-img", ["create", "-q", "-f", "qcow2", "-o", options, forged, String(site.disk.sizeBytes)]);
    site.restoreHost();
    copyFileSync(forged, `${forged}.2`);
    renameSync(`${forged}.2`, path.join(guestOf(site), "qemu-2000", `${DISK}.qcow2`));
    const { message } = await site.attack(vmBackup(site, 3000, "incremental"), new ShareAttacker(site.place));
    expect(message).toBeUndefined();
    await site.expectImage("backup/100/qemu-3000");
    expect(oracleOf(site, 3000)).toContain("3000");
  });
});

/** A restore in which somebody acts between its begin and the first read of the disk. */
function restoreWith(volname: string, act: () => void): Job {
  return async (provider) => {
    await provider.restore.restoreVmInit(volname, NEVER);
    try {
      act();
      const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(volname, DISK, NEVER);
      await using file = await open(qemuImgPath);
      return (await file.readFile()).toString("latin1");
    } finally {
      await provider.restore.restoreVmCleanup(volname);
    }
  };
}
