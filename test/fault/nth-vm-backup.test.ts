// SPDX-License-Identifier: AGPL-3.0-or-later
// One whole backup of a VM, from backup_init to the kept log, with notes and protection: each of its operations on
// the store and on the witness fails, in every way. FAULT_MATRIX=full plays each with every errno, which takes an hour.
// biome-ignore assist/source/organizeImports: it must come before the product
import { errnosFor, type Fault, type Step, stepsOf } from "../support/fault/fault-fs.ts";
import { describe, expect, it } from "vitest";
import { type Cell, FaultSite, MOST_POINTS } from "../support/fault/fault-job.ts";
import { isFull, MATRIX_TIMEOUT_MS } from "../support/fault/full-matrix.ts";
import { modeOf } from "../support/vm/vm-rules.ts";

type Flavour = Fault["flavour"];

/** Writes of an image come in batches, so that a run may have some more or less. */
const mayBeMissing = ({ kind, name, occurrence }: Step): boolean =>
  kind === "write" && name.endsWith(".qcow2") && occurrence > 1;

/** Plays every step of `steps`; `after` follows each cell. */
async function playAll(
  site: FaultSite,
  steps: readonly Step[],
  flavour: Flavour,
  after: (cell: Cell, left: readonly string[]) => Promise<void>,
): Promise<void> {
  for (const at of steps) {
    for (const errno of errnosFor(at.kind)) {
      const label = `${flavour} ${errno}: ${at.occurrence}. ${at.name.replace(site.node.dir, "")}`;
      // Every point of a chain has its lock: which one is meant is clear only where the base is a full one.
      const isUnclear = site.chainLength > 1 && at.name.includes("/.locks");
      if (isUnclear || site.points.size > MOST_POINTS) await site.startAgain();
      const cell = await site.job({ at, errno, flavour });
      try {
        if (!mayBeMissing(at)) expect(cell.fired).toBeDefined();
        const left = await site.expectWhole(cell);
        if (flavour === "before" || flavour === "onwards") expectNamed(cell, errno);
        if (flavour === "partial")
          expect([cell.error, ...cell.log.filter((line) => /^warn/.test(line))]).toEqual([undefined]);
        // A lock that was taken and a backup that became visible are looked for: a lost reply does not matter.
        if (flavour === "after" && /^link|^rename .*qemu-\*$/.test(at.name)) expect(cell.error).toBeUndefined();
        // What could not be removed waits for the next backup; everything else is gone at once.
        if (flavour === "before" && at.kind !== "unlink" && at.kind !== "rmdir") expect(left).toEqual([]);
        await after(cell, left);
      } catch (error) {
        throw new Error(`${label}: ${(error as Error).message}\n${cell.log.join("\n")}`, { cause: error });
      }
    }
  }
}

/** Whoever reads the log finds the cause: the errno stands in the error, or in a line of its own. */
function expectNamed({ error, log }: Cell, errno: string): void {
  if (error !== undefined) expect(`${String(error)} ${log.join(" ")}`).toContain(`(${errno})`);
}

/** Around the moment at which the backup becomes visible, and what decides about the next one. */
const isNearCommit = ({ name }: Step): boolean =>
  /manifest|state|pve-backup-host|^link|^rename|^sync .*(\/100|\.staging-\*)$/.test(name);

describe("an incremental backup", () => {
  it.for<[Flavour, number]>([
    ["before", 1],
    ["after", 3],
    ["onwards", 4],
    ["short", 1],
    ["partial", 1],
  ])(
    "is whole or not there when its Nth operation fails (%s)",
    { timeout: MATRIX_TIMEOUT_MS },
    async ([flavour, every]) => {
      await using site = await FaultSite.create({ "dir-compression": "none" });
      const first = await site.startAgain();
      const clean = await site.job();
      expect(modeOf(clean, "drive-scsi0")).toBe(`incremental since ${first.volname}`);
      const isOfWrites = flavour === "short" || flavour === "partial";
      const steps = stepsOf(clean.operations).filter(({ kind }) => !isOfWrites || kind === "write");
      const played = steps.filter((step, at) => isFull || isNearCommit(step) || at % every === 0);
      expect(played.length).toBeGreaterThan(isOfWrites ? 10 : 50);
      await site.startAgain();
      let cells = 0;
      await playAll(site, played, flavour, async ({ fired, log }, left) => {
        const isClose = fired !== undefined && isNearCommit(stepsOf([fired])[0] as Step);
        if (left.length === 0 && !isClose && cells++ % 10 > 0) return;
        const next = await site.expectNextBackup("it");
        // What the log did not give up is still good for an incremental backup.
        const isGivenUp = log.some((line) => line.endsWith("the next backup is a full one"));
        if (!isGivenUp) expect(new Set(next.modes.values())).toEqual(new Set(["use"]));
      });
      await site.expectNextBackup("all");
    },
  );
});

describe("a full backup with compression", () => {
  it.for<[Flavour, number, number]>([
    ["before", 1, 0],
    ["after", 6, 2],
    ["onwards", 6, 4],
  ])("is whole or not there when its Nth operation fails (%s)", { timeout: MATRIX_TIMEOUT_MS }, async (how) => {
    const [flavour, every, offset] = how;
    await using site = await FaultSite.create({ "dir-compression": "zstd", "vm-backup-mode": "full" });
    const clean = await site.startAgain();
    expect(modeOf(clean, "drive-scsi0")).toBe("full: vm-backup-mode is full");
    const steps = stepsOf(clean.operations);
    const played = steps.filter((_, at) => isFull || at % every === offset);
    await playAll(site, played, flavour, async (_cell, left) => {
      if (left.length > 0) await site.expectNextBackup("it");
    });
    await site.expectNextBackup("all");
  });
});
