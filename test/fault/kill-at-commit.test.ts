// SPDX-License-Identifier: AGPL-3.0-or-later
// The moments between the last byte and the answer of backup_vm, one by one: Node stops itself at each file
// operation of a commit (kill-hold.mjs), and then Node or vzdump is ended. The bitmap and the point must agree.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { BridgeBundle } from "../support/bridge/bridge-process.ts";
import { MATRIX_TIMEOUT_MS, someOf } from "../support/fault/full-matrix.ts";
import {
  descendantsOf,
  eventually,
  expectFailure,
  holdable,
  type SeenProcess,
  walk,
} from "../support/kill/kill-stage.ts";
import { stagePerTest } from "../support/kill/kill-vm-hooks.ts";
import type { KilledJob } from "../support/kill/kill-vm-stage.ts";

const INTERRUPTED = "full: the last backup was interrupted during its commit";

/** Where Node stands still; what is true if it never goes on. */
const MOMENTS = [
  { hold: "before rename 1 priv/pve-backup-host/bk/100.json$", isListed: false, next: "incremental" },
  { hold: "after rename 1 priv/pve-backup-host/bk/100.json$", isListed: false, next: INTERRUPTED },
  { hold: "before rename 1 /qemu-[0-9]+$", isListed: false, next: INTERRUPTED },
  { hold: "after rename 1 /qemu-[0-9]+$", isListed: true, next: INTERRUPTED },
  { hold: "after rename 1 /state.json$", isListed: true, next: INTERRUPTED },
  { hold: "before rename 2 priv/pve-backup-host/bk/100.json$", isListed: true, next: INTERRUPTED },
  { hold: "after rename 2 priv/pve-backup-host/bk/100.json$", isListed: true, next: "incremental" },
  { hold: "before unlink 1 /[.]lock$", isListed: true, next: "incremental" },
  { hold: "after unlink 1 /[.]lock$", isListed: true, next: "incremental" },
] as const;

const staged = stagePerTest();
let held: BridgeBundle;
beforeAll(async () => {
  held = await holdable(staged.bundle);
});
afterAll(() => held[Symbol.asyncDispose]());

/** A job whose Node stops at `hold`; `act` gets the stopped Node. */
async function holdAt(hold: string, act: (node: SeenProcess, vzdump: number) => void): Promise<KilledJob> {
  const program = await staged.stage.vzdump({ bundle: held, env: { PBH_TEST_HOLD: hold } });
  const vzdump = program.child.pid as number;
  const node = await eventually(`Node stopped ${hold}`, async () =>
    (await descendantsOf(vzdump)).find((one) => one.state === "T"),
  );
  await staged.stage.watchProcessesOf(program);
  act(node, vzdump);
  return await staged.stage.judge(await walk(program));
}

async function expectNext(mode: string, cell: string): Promise<void> {
  if (mode === "incremental") await staged.stage.expectNextIncremental(cell);
  else expect(await staged.stage.next(), cell).toBe(mode);
}

describe("a commit in which Node is killed with -9", () => {
  it("is there wholly or not at all, and the next backup trusts no bitmap that it may not", {
    timeout: MATRIX_TIMEOUT_MS,
  }, async () => {
    for (const { hold, isListed, next } of MOMENTS) {
      const job = await holdAt(hold, ({ pid }) => process.kill(pid, "SIGKILL"));
      expectFailure(job, /^Cannot finish "backup_vm": the backup bridge is gone, it was ended by SIGKILL/);
      expect([hold, job.isListed]).toEqual([hold, isListed]);
      await expectNext(next, hold);
    }
    await staged.stage.expectAllRight();
  });
});

describe("a commit that has begun", () => {
  const ENDS = [
    ["vzdump is killed", (_node: SeenProcess, vzdump: number) => process.kill(vzdump, "SIGKILL"), undefined],
    ["vzdump is interrupted", (_node: SeenProcess, vzdump: number) => process.kill(vzdump, "SIGTERM"), /^interrupted/],
    [
      "Node is asked to end",
      ({ pid }: SeenProcess) => process.kill(pid, "SIGTERM"),
      /asked to end by SIGTERM|got SIGTERM/,
    ],
  ] as const;

  it("is finished whoever ends, and its point is the next one's base", { timeout: MATRIX_TIMEOUT_MS }, async () => {
    for (const [turn, { hold }] of MOMENTS.entries()) {
      for (const [name, end, sentence] of someOf(ENDS, turn)) {
        const cell = `${hold}, ${name}`;
        const job = await holdAt(hold, (node, vzdump) => {
          end(node, vzdump);
          process.kill(node.pid, "SIGCONT");
        });
        if (sentence !== undefined) expectFailure(job, sentence);
        expect([cell, job.isListed]).toEqual([cell, true]);
        expect(await staged.stage.leftovers(), cell).toEqual([]);
        await staged.stage.expectNextIncremental(cell);
      }
    }
    await staged.stage.expectAllRight();
  });
});

describe("notes of a backup whose setting is killed", () => {
  it.each(["before", "after"])("%s the rename leave a job that is well and a backup without a lock", async (when) => {
    const job = await holdAt(`${when} rename 1 /attributes.json$`, ({ pid }) => process.kill(pid, "SIGKILL"));
    expect(job.status, job.output).toBe(0);
    expect(job.output).toMatch(
      /^WARN: unable to add notes - Cannot finish "update_volume_attribute": the backup bridge/m,
    );
    await staged.stage.expectNextIncremental(when);
  });
});
