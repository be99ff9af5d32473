// SPDX-License-Identifier: AGPL-3.0-or-later
// Our reservations beside a Perl program that makes them as Proxmox VE's modules do: same file, same lock.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, readdir } from "node:fs/promises";
import path from "node:path";
import { text } from "node:stream/consumers";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { lockFile } from "../../../src/device/file-lock.ts";
import { reserveNbdNode } from "../../../src/device/nbd-reservation.ts";
import { NbdTree } from "../../support/nbd/nbd-tree.ts";
import { type Bundle, buildProgram } from "../../support/programs/bundle.ts";
import { requireTool } from "../../support/programs/tools.ts";

const ROUNDS = 50;
const support = path.join(import.meta.dirname, "../../support/nbd");
const never = new AbortController().signal;

let program: Bundle;
let tree: NbdTree;
const children: ChildProcess[] = [];

beforeAll(async () => {
  program = await buildProgram("test/support/nbd/nbd-contender.ts");
});
afterAll(() => program[Symbol.asyncDispose]());

beforeEach(async (context) => {
  requireTool(context, "perl");
  tree = await NbdTree.create(ROUNDS + 4); // the Perl program's lines outlive its rounds
  await mkdir(path.dirname(tree.lockFile), { recursive: true });
  await mkdir(path.dirname(tree.reservationFile), { recursive: true });
});

afterEach(async () => {
  for (const child of children.splice(0)) {
    if (child.exitCode !== null || child.signalCode !== null) continue;
    const exited = once(child, "exit");
    child.kill("SIGKILL");
    await exited;
  }
  await tree[Symbol.asyncDispose]();
});

function start(command: string, args: readonly string[]) {
  const child = spawn(command, args, { stdio: ["pipe", "pipe", "inherit"] });
  children.push(child);
  return child;
}

const startOurs = () => start(process.execPath, [program.path, JSON.stringify(tree.host), `${ROUNDS}`]);
const startPerl = (what: string) => start("perl", ["-T", path.join(support, "nbd-contender.pl"), tree.dir, what]);

async function startHolder(): Promise<ChildProcess> {
  const holder = startPerl("hold");
  await once(holder.stdout, "data");
  return holder;
}

describe("reserveNbdNode() beside a Perl program", () => {
  it("waits while Perl's flock is held, and goes on when it is released", async () => {
    const holder = await startHolder();
    let isReserved = false;
    const reserving = reserveNbdNode({ host: tree.host, signal: never }).then((node) => {
      isReserved = true;
      return node;
    });
    await new Promise((resolve) => setTimeout(resolve, 300));
    expect(isReserved).toBe(false);
    holder.stdin?.end();
    expect((await reserving).index).toBe(0);
  });

  it("makes Perl wait while it holds the lock, and its own other tries", async () => {
    const lock = await lockFile(tree.lockFile, 1_000, never);
    const holder = startPerl("hold");
    let isLocked = false;
    const locked = once(holder.stdout, "data").then(() => {
      isLocked = true;
    });
    const again = lockFile(tree.lockFile, 300, never);
    await expect(again).rejects.toThrow(/^Cannot lock ".*\.lock": another program has held it for 0.3 s$/);
    expect(isLocked).toBe(false);
    await lock[Symbol.asyncDispose]();
    await locked;
    holder.stdin.end();
  });

  it("gives up after the limit, and at once when the job is cancelled", async () => {
    await startHolder();
    const reason = new Error("the job was cancelled");
    const aborter = new AbortController();
    setTimeout(() => aborter.abort(reason), 100);
    await expect(reserveNbdNode({ host: tree.host, signal: aborter.signal })).rejects.toBe(reason);
    await expect(lockFile(tree.lockFile, 100, never)).rejects.toMatchObject({ code: "ENVIRONMENT" });
    expect(await tree.reservations()).toBe("");
  });

  it("gets the lock when its holder is killed", async () => {
    const holder = await startHolder();
    holder.kill("SIGKILL");
    expect((await reserveNbdNode({ host: tree.host, signal: never })).index).toBe(0);
  });

  it("never shares a node with a Perl program in 50 rounds each", { timeout: 180_000 }, async () => {
    expect(await contend(startOurs(), startPerl(`${ROUNDS}`))).toEqual(["done\n", "done\n"]);
    expect(await nodesInUse()).toEqual([]);
  });

  it("never shares a node with another of its kind in 50 rounds each, and leaves nothing", {
    timeout: 180_000,
  }, async () => {
    expect(await contend(startOurs(), startOurs())).toEqual(["done\n", "done\n"]);
    expect(await nodesInUse()).toEqual([]);
    expect(await tree.reservations()).toBe("");
    expect(await readdir(path.dirname(tree.reservationFile))).toEqual(["reserved-dev-nbd-nodes"]);
  });
});

/** What each of them printed. */
async function contend(...contenders: ReadonlyArray<ReturnType<typeof start>>): Promise<string[]> {
  return await Promise.all(contenders.map(async ({ stdout }) => await text(stdout)));
}

async function nodesInUse(): Promise<string[]> {
  const files = await readdir(path.join(tree.host.sys, "block"), { recursive: true });
  return files.filter((name) => path.basename(name) === "pid");
}
