// SPDX-License-Identifier: AGPL-3.0-or-later
// One whole restore of a container, from a file and from a folder that the kernel or squashfuse shows: each of its
// operations on the store (locks) and on the folder for mounts fails. Either what tar extracts is the container, or one
// sentence says why not; no server, mount, loop device, lock or folder stays behind for good.
// biome-ignore assist/source/organizeImports: it must come before the product
import { errnosFor, type Fault, faultSwitch, type Operation, type Step, stepsOf } from "../support/fault/fault-fs.ts";
import { chmod, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it, onTestFailed } from "vitest";
import { runTool } from "../../fixtures/lab/index.ts";
import type { ContainerOffer } from "../../src/provider/index.ts";
import { treeOf } from "../support/container/container-node.ts";
import { CONFIG, ContainerSite, FIREWALL } from "../support/fault/fault-container.ts";
import { age, endOwners, leftBelow } from "../support/fault/fault-folder.ts";
import { expectNothingRuns, KINDS_OF_A_RESTORE, sentenceOf } from "../support/fault/fault-rules.ts";
import { MATRIX_TIMEOUT_MS } from "../support/fault/full-matrix.ts";
import { requireTool } from "../support/programs/tools.ts";

const FLAVOURS = ["before", "after", "onwards", "short"] as const;
const never = new AbortController().signal;

/** How the archive reaches pct's tar, and the type of the file system that shows it. */
const WAYS = [
  { way: "tar", mode: "tar", type: undefined, kinds: KINDS_OF_A_RESTORE },
  { way: "a squashfs mount", mode: "squashfs", type: "squashfs", kinds: KINDS_OF_A_RESTORE },
  { way: "squashfuse", mode: "squashfs", type: "fuse.squashfuse_ll", kinds: KINDS_OF_A_RESTORE },
] as const;
type Way = (typeof WAYS)[number];

interface Outcome {
  readonly error: unknown;
  /** What tar extracted; empty if the restore did not get that far. */
  readonly tree: readonly string[];
  readonly fired: Operation | undefined;
  readonly operations: readonly Operation[];
}

/** From now on the kernel of `site` has no squashfs. */
async function takeSquashfsAway(site: ContainerSite): Promise<Disposable> {
  const folder = path.join(site.dir, "bin");
  await mkdir(folder);
  const refusal = "echo \"unknown filesystem type 'squashfs'\" >&2\nexit 32";
  await writeFile(
    path.join(folder, "mount"),
    `#!/bin/sh\n[ "$2" = squashfs ] || exec /usr/bin/mount "$@"\n${refusal}\n`,
  );
  await chmod(path.join(folder, "mount"), 0o755);
  const before = process.env.PATH;
  process.env.PATH = `${folder}:${before}`;
  return {
    [Symbol.dispose]: () => {
      process.env.PATH = before;
    },
  };
}

/** The type of the file system that is mounted at `point`. */
async function typeAt(point: string): Promise<string | undefined> {
  const lines = (await readFile("/proc/self/mountinfo", "utf8")).split("\n");
  return lines
    .find((line) => line.split(" ")[4] === point)
    ?.split(" - ")[1]
    ?.split(" ")[0];
}

/** As pct does it, apart from the user namespace. @returns what tar extracted */
async function extract(site: ContainerSite, offer: ContainerOffer, { type }: Way): Promise<string[]> {
  const target = path.join(site.dir, "target");
  await rm(target, { recursive: true, force: true });
  await mkdir(target);
  if ("tarPath" in offer) {
    expect(path.extname(offer.tarPath)).toBe(".tar");
    await runTool("tar", ["xpf", offer.tarPath, "--numeric-owner", "-C", target]);
  } else {
    expect(await typeAt(offer.archiveDirectory)).toBe(type);
    const copy = 'set -o pipefail; tar cpf - --sparse -C "$1" . | tar xpf - --numeric-owner -C "$2"';
    await runTool("bash", ["-c", copy, "-", offer.archiveDirectory, target]);
  }
  return await treeOf(target);
}

/** PVE's calls. */
async function restore(site: ContainerSite, way: Way): Promise<string[]> {
  await using provider = site.provider();
  expect(await provider.restore.archiveGetGuestConfig(site.newest, never)).toEqual(CONFIG);
  expect(await provider.restore.archiveGetFirewallConfig(site.newest, never)).toEqual(FIREWALL);
  const { mechanism } = await provider.restore.restoreGetMechanism(site.newest, never);
  expect(mechanism).toBe(way.mode === "tar" ? "tar" : "directory");
  const offer = await provider.restore.restoreContainerInit(site.newest, never);
  try {
    return await extract(site, offer, way);
  } finally {
    await provider.restore.restoreContainerCleanup(site.newest);
  }
}

async function restoreWith(site: ContainerSite, way: Way, fault?: Fault): Promise<Outcome> {
  site.log.length = 0;
  let error: unknown;
  let tree: string[] = [];
  faultSwitch.arm(site.folders, fault);
  try {
    tree = await restore(site, way);
  } catch (thrown) {
    error = thrown;
  } finally {
    faultSwitch.disarm();
  }
  return { error, tree, fired: faultSwitch.fired, operations: [...faultSwitch.operations] };
}

/** What must hold after every cell. @returns what is left for the next restore or backup */
async function expectRightOrClear(site: ContainerSite, { error, tree }: Outcome): Promise<string[]> {
  await expectNothingRuns(site.dir);
  for (const line of site.log) {
    expect(line).toMatch(/^warn: [A-Z][^\n]*[^:\s]$/);
    expect(line).not.toMatch(/undefined|\[object|injected/);
  }
  if (error === undefined) expect(tree).toEqual(await treeOf(site.tree));
  else sentenceOf(error);
  return await leftBelow(site.folders);
}

/** Where the kernel cannot, and only there, the task log says what that may cost. */
const warningsOf = ({ way }: Way): unknown[] =>
  way === "squashfuse"
    ? [expect.stringMatching(/^warn: The kernel cannot mount "backup\S+" \(.+\), so squashfuse /)]
    : [];

/** A restore that nothing disturbs: right, and it sweeps what the one before left of its mounts. */
async function mustRestore(site: ContainerSite, way: Way): Promise<Outcome> {
  await endOwners(site.runDir);
  const outcome = await restoreWith(site, way);
  expect(outcome.error).toBeUndefined();
  expect(site.log).toEqual(warningsOf(way));
  const left = await expectRightOrClear(site, outcome);
  // A reader that could not remove its lock leaves it to the next backup: nobody else sweeps in the store.
  if (left.length === 0) return outcome;
  expect(left.filter((file) => !file.includes("/.locks/"))).toEqual([]);
  await age(left);
  const next = await site.vzdump();
  expect(next.message).toBeUndefined();
  expect(await site.expectWhole(next)).toEqual([]);
  return outcome;
}

/** A store that takes no new file can still be restored from; the folder for what is on offer is needed. */
const mustSucceed = ({ mode }: Way, { at, errno, flavour }: Fault): boolean =>
  mode === "tar" &&
  flavour !== "onwards" &&
  !at.name.includes("/run/pve-backup-host") &&
  (errno === "ENOSPC" || errno === "EDQUOT" || errno === "EROFS");

/** What could not be removed waits for the next one; everything else is gone at once. */
const mayStay = ({ kind }: Step): boolean => kind === "unlink" || kind === "rmdir";

describe.each(WAYS)("a container's restore from $way", (way) => {
  it.for(FLAVOURS)(
    "is right or fails when its Nth operation fails (%s)",
    { timeout: MATRIX_TIMEOUT_MS },
    async (flavour, context) => {
      requireTool(context, "tar", "mksquashfs", "squashfuse_ll", "fusermount3", "setpriv", "getfattr");
      await using site = await ContainerSite.create(way.mode);
      using _kernel = way.way === "squashfuse" ? await takeSquashfsAway(site) : undefined;
      const backup = await site.vzdump();
      expect(backup.message).toBeUndefined();
      const all = stepsOf((await mustRestore(site, way)).operations);
      expect(new Set(all.map(({ kind }) => kind))).toEqual(new Set(way.kinds));
      const steps = all.filter(({ kind }) => kind === "write" || flavour !== "short");
      let cell = "";
      onTestFailed(() => console.info(cell, site.log));
      for (const at of steps) {
        for (const errno of errnosFor(at.kind)) {
          cell = `${flavour} ${errno}: ${at.occurrence}. ${at.name}`;
          const outcome = await restoreWith(site, way, { at, errno, flavour });
          expect(outcome.fired).toBeDefined();
          const left = await expectRightOrClear(site, outcome);
          // A lock that was taken is looked for: a lost reply does not matter.
          const isTaken = flavour === "after" && at.kind === "link";
          if (isTaken || mustSucceed(way, { at, errno, flavour })) expect(outcome.error).toBeUndefined();
          if (flavour === "before" && !mayStay(at)) expect(left).toEqual([]);
          await mustRestore(site, way);
        }
      }
    },
  );
});
