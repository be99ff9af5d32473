// SPDX-License-Identifier: AGPL-3.0-or-later
// What a killed process leaves behind: its servers end with it, its mounts go with the next sweep.
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { sweepRawViews } from "../../../src/device/index.ts";
import { listMounts, parseMounts } from "../../../src/device/mounts.ts";
import { type Bundle, buildProgram } from "../../support/programs/bundle.ts";
import { processesNaming } from "../../support/programs/processes.ts";
import { requireTool } from "../../support/programs/tools.ts";

const MIB = 1024 * 1024;
const run = promisify(execFile);
const unexpected = (message: string): void => expect.unreachable(message);

let program: Bundle;
let dir: string;
let runDir: string;
let holder: ChildProcess | undefined;

beforeAll(async () => {
  program = await buildProgram("test/support/vm/hold-raw-view.ts");
});
afterAll(() => program[Symbol.asyncDispose]());

beforeEach(async (context) => {
  requireTool(context, "qemu-img", "qemu-storage-daemon", "qemu-nbd", "nbdfuse", "setpriv", "fusermount3");
  dir = await mkdtemp(path.join(os.tmpdir(), "raw-view-sweep-"));
  runDir = path.join(dir, "run");
});

afterEach(async () => {
  holder?.kill("SIGKILL");
  await sweepRawViews(runDir, unexpected);
  expect(await processesNaming(dir)).toEqual([]);
  expect(await mountsNaming(dir)).toEqual([]);
  await rm(dir, { recursive: true, force: true });
});

async function mountsNaming(text: string): Promise<string[]> {
  return (await listMounts()).map(({ point }) => point).filter((point) => point.includes(text));
}

/** Starts another Node process that holds a view; resolves when it does. */
async function startHolder(mechanism: string): Promise<{ child: ChildProcess; servers: number[] }> {
  const image = path.join(dir, "a.qcow2");
  await run("qemu-img", ["create", "-q", "-f", "qcow2", image, `${MIB}`]);
  const child = spawn(process.execPath, [program.path, image, `${MIB}`, runDir, mechanism], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  holder = child;
  await once(child.stdout, "data");
  const servers = (await processesNaming(dir)).filter((pid) => pid !== child.pid);
  return { child, servers };
}

async function waitUntilGone(pids: readonly number[]): Promise<void> {
  for (let tries = 0; tries < 200; tries++) {
    const alive = await processesNaming(dir);
    if (!pids.some((pid) => alive.includes(pid))) return;
    await sleep(20);
  }
}

describe.each(["fuse-export", "nbdfuse"])("a raw view by %s whose owner is killed", (mechanism) => {
  it("takes its servers with it, and a sweep removes the rest", async () => {
    const { child, servers } = await startHolder(mechanism);
    expect(servers).toHaveLength(mechanism === "nbdfuse" ? 2 : 1);
    const exited = once(child, "exit");
    child.kill("SIGKILL");
    await exited;
    await waitUntilGone(servers);
    expect(await processesNaming(dir)).toEqual([]);
    await sweepRawViews(runDir, unexpected);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("is swept away when servers and owner were killed together", async () => {
    const { child, servers } = await startHolder(mechanism);
    const exited = once(child, "exit");
    for (const pid of servers) process.kill(pid, "SIGKILL");
    child.kill("SIGKILL");
    await exited;
    await waitUntilGone(servers);
    expect(await mountsNaming(dir)).not.toEqual([]);
    await sweepRawViews(runDir, unexpected);
    expect(await mountsNaming(dir)).toEqual([]);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("is swept away although a server hangs", { timeout: 180_000 }, async () => {
    const { child, servers } = await startHolder(mechanism);
    for (const pid of servers) process.kill(pid, "SIGSTOP");
    const exited = once(child, "exit");
    child.kill("SIGKILL");
    await exited;
    await sweepRawViews(runDir, unexpected);
    expect(await processesNaming(dir)).toEqual([]);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("stays while the owner lives", async () => {
    const { servers } = await startHolder(mechanism);
    await sweepRawViews(runDir, unexpected);
    expect(await mountsNaming(dir)).toHaveLength(1);
    expect((await processesNaming(dir)).filter((pid) => servers.includes(pid))).toEqual(servers);
    holder?.kill("SIGKILL");
    await waitUntilGone([...servers, holder?.pid ?? 0]);
  });
});

describe("sweepRawViews()", () => {
  it("removes a folder without a record when nobody has its pid, and keeps it otherwise", async () => {
    const child = spawn("true");
    await once(child, "exit");
    const dead = path.join(runDir, `restore-${child.pid}-0`);
    const living = path.join(runDir, `restore-${process.pid}-7`);
    for (const folder of [dead, living]) await mkdir(folder, { recursive: true });
    await sweepRawViews(runDir, unexpected);
    expect(await readdir(runDir)).toEqual([path.basename(living)]);
  });

  it("is not fooled by a pid that was used again", async () => {
    const folder = path.join(runDir, `restore-${process.pid}-3`);
    await mkdir(folder, { recursive: true });
    const bootId = (await readFile("/proc/sys/kernel/random/boot_id", "latin1")).trim();
    const owner = { bootId, pid: process.pid, startTime: "1" };
    await writeFile(path.join(folder, "owner.json"), JSON.stringify({ owner, children: [] }));
    await sweepRawViews(runDir, unexpected);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("ends no process whose identity differs from the record", async () => {
    const bystander = spawn("sleep", ["60"]);
    await once(bystander, "spawn");
    const folder = path.join(runDir, "restore-999999999-0");
    await mkdir(folder, { recursive: true });
    const bootId = (await readFile("/proc/sys/kernel/random/boot_id", "latin1")).trim();
    const owner = { bootId, pid: 999_999_999, startTime: "1" };
    const children = [{ bootId, pid: bystander.pid, startTime: "1" }];
    await writeFile(path.join(folder, "owner.json"), JSON.stringify({ owner, children }));
    await sweepRawViews(runDir, unexpected);
    expect(bystander.exitCode).toBeNull();
    expect(bystander.signalCode).toBeNull();
    const exited = once(bystander, "exit");
    bystander.kill("SIGKILL");
    await exited;
  });

  it("touches nothing that has another name", async () => {
    await mkdir(path.join(runDir, "something-else"), { recursive: true });
    await writeFile(path.join(runDir, "restore-1.txt"), "");
    await sweepRawViews(runDir, unexpected);
    expect((await readdir(runDir)).sort()).toEqual(["restore-1.txt", "something-else"]);
  });
});

describe("parseMounts()", () => {
  it("takes point, type and source, whatever is optional, and undoes the kernel's octal escapes", () => {
    const mountinfo =
      "36 35 98:0 / /mnt/a\\040b\\134c rw,noatime - ext3 /dev/root rw\n" +
      "37 36 0:39 / /run/x.raw rw shared:7 master:1 - fuse.nbdfuse nbdfuse rw,user_id=0\n" +
      "38 36 0:40 / /mnt/a\\040-\\040b rw shared:8 - fuse some\\040-\\040source rw\n";
    expect(parseMounts(mountinfo)).toEqual([
      { point: "/mnt/a b\\c", type: "ext3", source: "/dev/root" },
      { point: "/run/x.raw", type: "fuse.nbdfuse", source: "nbdfuse" },
      { point: "/mnt/a - b", type: "fuse", source: "some - source" },
    ]);
  });
});
