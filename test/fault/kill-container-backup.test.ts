// SPDX-License-Identifier: AGPL-3.0-or-later
// Every process of a container's backup is killed at every call that Proxmox VE makes, and in mid-copy: what is
// listed is whole, nothing stays behind, the task log says why in one sentence, the next backup is right.
// FAULT_MATRIX=full runs every signal at every place.

import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { isFull, MATRIX_TIMEOUT_MS, someOf } from "../support/fault/full-matrix.ts";
import { ContainerStage } from "../support/kill/kill-container-stage.ts";
import { endProcess, expectFailure, isNode, type SeenProcess, walk } from "../support/kill/kill-stage.ts";
import type { Program } from "../support/programs/scripted-pve.ts";
import { requireTool } from "../support/programs/tools.ts";

/** KiB per second: the archive of a large file lasts until somebody ends it. */
const SLOW = { bwlimit: 64 };
const LARGE_BYTES = 6 * 2 ** 20;
const NOTICED_MS = 45_000;
const CALLS = [
  "job_init",
  "backup_init",
  "backup_get_mechanism",
  "backup_container_prepare",
  "backup_container",
  "backup_cleanup",
  "backup_handle_log_file",
  "job_cleanup",
] as const;
type Call = (typeof CALLS)[number];
const isCommitted = (call: Call): boolean => CALLS.indexOf(call) >= CALLS.indexOf("backup_container");

/** What the other Node says of the end of the one that owns the store. */
const OWNER_GONE = {
  SIGKILL: /^Cannot finish the backup: the process that commits it has ended$/,
  SIGTERM: /^Cancelled: the backup of container 101 has ended$/,
} as const;

let stage: ContainerStage;
beforeEach((context) => {
  requireTool(context, "tar", "mksquashfs", "unsquashfs", "newuidmap", "zstd", "setpriv", "perl", "getfattr");
});
afterEach(() => stage?.[Symbol.asyncDispose]());

const stepped = (): Promise<Program> => stage.vzdump(["--step"]);
/** Who takes part in the backup of an unprivileged container. */
const VICTIMS = {
  "the Node that owns the store": (one: SeenProcess, vzdump: number) => isNode(one) && one.parent === vzdump,
  "the Node in the user namespace": (one: SeenProcess, vzdump: number) => isNode(one) && one.parent !== vzdump,
  "vzdump's child": (one: SeenProcess, vzdump: number) => one.name === "perl" && one.parent === vzdump,
  tar: ({ name }: SeenProcess) => name === "tar",
  zstd: ({ name }: SeenProcess) => name === "zstd",
  mksquashfs: ({ name }: SeenProcess) => name === "mksquashfs",
} as const;

describe("a container's backup of which vzdump is ended after a call", () => {
  it("leaves nothing, and keeps what was complete", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    stage = await ContainerStage.create({ "lxc-backup-mode": "tar", "dir-compression": "zstd" });
    const { boundaries } = await stage.judge(await walk(await stepped()));
    expect(boundaries).toEqual(CALLS.flatMap((call) => [`before ${call}`, `after ${call}`]));
    for (const [turn, call] of CALLS.entries()) {
      for (const signal of someOf(["SIGKILL", "SIGTERM"] as const, turn)) {
        const cell = `${call} ${signal}`;
        const program = await stepped();
        const job = await stage.killAt(program, `after ${call}`, () => void program.child.kill(signal));
        if (signal === "SIGTERM") expectFailure(job, /^interrupted by (?:unexpected )?signal$/);
        expect([cell, job.isListed]).toEqual([cell, isCommitted(call)]);
        expect(await stage.leftovers(), cell).toEqual([]);
        await stage.next(cell);
      }
    }
    await stage.expectRestores();
  });
});

describe("a container's backup of which the Node that owns the store is ended before a call", () => {
  it("fails with the call's name, and the next one sweeps", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    stage = await ContainerStage.create({ "lxc-backup-mode": "squashfs" });
    for (const [turn, call] of CALLS.slice(1).entries()) {
      for (const signal of someOf(["SIGTERM", "SIGKILL"] as const, turn)) {
        const cell = `${call} ${signal}`;
        const program = await stepped();
        const job = await stage.killAt(program, `before ${call}`, async () => {
          const victim = await stage.find(program, "Node", VICTIMS["the Node that owns the store"]);
          await endProcess(victim.pid, signal);
        });
        expect([cell, job.isListed]).toEqual([cell, CALLS.indexOf(call) > CALLS.indexOf("backup_container")]);
        if (call === "backup_handle_log_file") expect(job.output).toMatch(/^WARN: cannot keep the log file: /m);
        else if (call === "backup_container") expectFailure(job, OWNER_GONE[signal]);
        else expectFailure(job, new RegExp(`^Cannot finish "${call}": the backup bridge is gone`));
        if (signal === "SIGTERM") expect(await stage.leftovers(), cell).toEqual([]);
        await stage.next(cell);
      }
    }
    await stage.expectRestores();
  });
});

describe("a container's backup in mid-copy", () => {
  async function create(scfg: Record<string, unknown>, guest: Record<string, unknown> = {}): Promise<void> {
    stage = await ContainerStage.create(scfg, guest, { "home/u/large": seededBytes("large", LARGE_BYTES) });
  }

  async function endInMidCopy(tool: keyof typeof VICTIMS, name: keyof typeof VICTIMS, signal: NodeJS.Signals) {
    const program = await stage.vzdump([], SLOW);
    await stage.find(program, tool, VICTIMS[tool]);
    const victim = await stage.find(program, name, VICTIMS[name]);
    await stage.watchProcessesOf(program);
    process.kill(victim.pid, signal);
    // The limit may have stopped it, and a stopped process takes no SIGTERM.
    if (name === "mksquashfs" && signal === "SIGTERM") process.kill(victim.pid, "SIGCONT");
    // The rest of the container is not read in vain: at this pace that takes longer.
    const ended = await Promise.race([program.result, sleep(NOTICED_MS)]);
    if (ended === undefined) program.child.kill("SIGKILL");
    expect(ended, `${name} ${signal}: still running`).toBeDefined();
    const job = await stage.judge(await walk(program));
    expect([name, signal, job.isListed]).toEqual([name, signal, false]);
    return job;
  }

  const TAR = [
    ["tar", "SIGKILL", /^Cannot archive ".*": tar was ended by SIGKILL/],
    ["tar", "SIGTERM", /^Cannot archive ".*": tar was ended by SIGTERM/],
    ["zstd", "SIGKILL", /^Cannot compress "archive.tar.zst": zstd was ended by SIGKILL/],
    ["zstd", "SIGTERM", /^Cannot compress "archive.tar.zst": zstd was ended by SIGTERM/],
    [
      "the Node in the user namespace",
      "SIGKILL",
      /^Cannot finish "backup_container": the backup bridge is gone, .*SIGKILL/,
    ],
    [
      "the Node in the user namespace",
      "SIGTERM", // with its last words, or without
      /^Cancelled: the backup bridge got SIGTERM$|^Cannot finish "backup_container": the backup bridge is gone, it was asked to end by SIGTERM$/,
    ],
    ["the Node that owns the store", "SIGKILL", OWNER_GONE.SIGKILL],
    ["the Node that owns the store", "SIGTERM", OWNER_GONE.SIGTERM],
    [
      "vzdump's child",
      "SIGKILL",
      /^Cannot finish the backup of guest 101: nothing was committed, so there is no backup$/,
    ],
    ["vzdump's child", "SIGTERM", /^interrupted by signal$/],
  ] as const;

  /** Left to the full matrix: they differ from a row beside them by the signal alone. */
  const LEAST = new Set([1, 3, 5]);

  it("of a compressed tar fails by whatever ends", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    await create({ "lxc-backup-mode": "tar", "dir-compression": "zstd" });
    for (const [name, signal, sentence] of TAR.filter((_, n) => isFull || !LEAST.has(n))) {
      expectFailure(await endInMidCopy("tar", name, signal), sentence);
      await stage.next(`${name} ${signal}`);
    }
    await stage.expectRestores();
  });

  it("of a squashfs image fails when mksquashfs ends", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    await create({ "lxc-backup-mode": "squashfs", "dir-compression": "zstd" });
    for (const signal of ["SIGKILL", "SIGTERM"] as const) {
      const job = await endInMidCopy("mksquashfs", "mksquashfs", signal);
      expectFailure(job, /^Cannot archive ".*": mksquashfs (?:was ended by SIG|ended with status)/);
      await stage.next(signal);
    }
    await stage.expectRestores();
  });

  it("of a privileged container ends without a trace when vzdump ends", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    await create({ "lxc-backup-mode": "tar" }, { privileged: 1 });
    for (const signal of ["SIGKILL", "SIGTERM", "SIGHUP"] as const) {
      const program = await stage.vzdump([], SLOW);
      await stage.find(program, "tar", VICTIMS.tar);
      await stage.watchProcessesOf(program);
      program.child.kill(signal);
      const job = await stage.judge(await walk(program));
      expect([signal, job.isListed]).toEqual([signal, false]);
      if (signal !== "SIGKILL") expectFailure(job, /^interrupted by signal$/);
      expect(await stage.leftovers(), signal).toEqual([]);
      await stage.next(signal);
    }
  });
});
