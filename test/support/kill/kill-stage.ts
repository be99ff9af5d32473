// SPDX-License-Identifier: AGPL-3.0-or-later
// Scripted Proxmox VE programs that a test stops at every call to the bridge, the processes they consist of, and what
// must be true whatever was killed.
import { mkdir, readdir, readFile, readlink, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { expect } from "vitest";
import type { BridgeBundle } from "../bridge/bridge-process.ts";
import type { Program, ProgramResult } from "../programs/scripted-pve.ts";

const DEADLINE_MS = 30_000;
const POLL_MS = 10;
const STEP_POLL_MS = 3;

/** One process as seen in /proc. */
export interface SeenProcess {
  readonly pid: number;
  readonly parent: number;
  /** "R", "S", "T" (stopped), "Z"... */
  readonly state: string;
  readonly startTime: string;
  /** At most 15 characters, as the kernel stores it. */
  readonly name: string;
}

export const isNode = ({ name }: SeenProcess): boolean => /^(?:node|MainThread)$/.test(name);

async function seeProcess(pid: number): Promise<SeenProcess | undefined> {
  const stat = await readFile(`/proc/${pid}/stat`, "latin1").catch(() => undefined);
  if (stat === undefined) return undefined;
  const end = stat.lastIndexOf(")");
  const [state = "", parent = ""] = stat.slice(end + 2).split(" ");
  const startTime = stat.slice(end + 2).split(" ")[19] ?? "";
  return { pid, parent: Number(parent), state, startTime, name: stat.slice(stat.indexOf("(") + 1, end) };
}

/**
 * Everything that descends from `pid`, parents first. Reads the lists of children and not all processes: the kernel
 * blocks a reader of a process that hangs in a file system, and unrelated processes may hang so.
 */
export async function descendantsOf(pid: number): Promise<SeenProcess[]> {
  const found: SeenProcess[] = [];
  const wanted = [pid];
  for (let parent = wanted.shift(); parent !== undefined; parent = wanted.shift()) {
    for (const child of await childrenOf(parent)) {
      const seen = await seeProcess(child);
      if (seen === undefined || seen.state === "Z") continue;
      found.push(seen);
      wanted.push(child);
    }
  }
  return found;
}

async function childrenOf(pid: number): Promise<number[]> {
  const children: number[] = [];
  for (const thread of await readdir(`/proc/${pid}/task`).catch(() => [])) {
    const list = await readFile(`/proc/${pid}/task/${thread}/children`, "latin1").catch(() => "");
    children.push(
      ...list
        .split(" ")
        .filter((one) => one !== "")
        .map(Number),
    );
  }
  return children;
}

/** Polls until `look` finds something. */
export async function eventually<T>(what: string, look: () => Promise<T | undefined>): Promise<T> {
  const deadline = performance.now() + DEADLINE_MS;
  for (;;) {
    const found = await look();
    if (found !== undefined) return found;
    if (performance.now() > deadline) throw new Error(`never seen: ${what}`);
    await sleep(POLL_MS);
  }
}

/** Those of `processes` that still run after some time: there must be none. */
export async function survivorsOf(processes: readonly SeenProcess[]): Promise<string[]> {
  const deadline = performance.now() + DEADLINE_MS;
  for (;;) {
    const alive: string[] = [];
    for (const { pid, startTime, name } of processes) {
      const now = await seeProcess(pid);
      if (now !== undefined && now.startTime === startTime && now.state !== "Z") alive.push(`${name} (${pid})`);
    }
    if (alive.length === 0 || performance.now() > deadline) return alive;
    await sleep(POLL_MS);
  }
}

/**
 * Ends a process and waits until it is gone, or a zombie: then no other process meets it half-way.
 * | @param halted the process that is stopped until then; a stopped process does not take SIGTERM
 */
export async function endProcess(pid: number, signal: NodeJS.Signals, halted?: number): Promise<void> {
  process.kill(pid, signal);
  if (halted !== undefined && (halted !== pid || signal !== "SIGKILL")) resume(halted);
  await eventually(`the end of ${pid} by ${signal}`, async () => {
    const seen = await seeProcess(pid);
    return seen === undefined || seen.state === "Z" ? true : undefined;
  });
}

/** Lets a stopped process go on. When another process was killed, its children may have ended already. */
export function resume(pid: number): void {
  try {
    process.kill(pid, "SIGCONT");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}

/** A bundle that loads kill-hold.mjs first. */
export async function holdable(bundle: BridgeBundle): Promise<BridgeBundle> {
  const file = bundle.path.replace(/\.mjs$/, "-held.mjs");
  const hold = path.join(import.meta.dirname, "kill-hold.mjs");
  await writeFile(file, `import ${JSON.stringify(hold)};\nawait import(${JSON.stringify(bundle.path)});\n`);
  return { path: file, [Symbol.asyncDispose]: () => bundle[Symbol.asyncDispose]() };
}

/** A bundle whose Node finds these programs before all others: name to shell script. */
export async function withPrograms(
  bundle: { readonly path: string },
  programs: Readonly<Record<string, string>>,
): Promise<BridgeBundle> {
  const folder = bundle.path.replace(/\.mjs$/, "-programs");
  await mkdir(folder);
  for (const [name, script] of Object.entries(programs))
    await writeFile(path.join(folder, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  const file = path.join(folder, "bridge.mjs");
  const first = JSON.stringify(`${folder}:`);
  await writeFile(
    file,
    `process.env.PATH = ${first} + process.env.PATH;\nawait import(${JSON.stringify(bundle.path)});\n`,
  );
  return { path: file, [Symbol.asyncDispose]: () => rm(folder, { recursive: true }) };
}

/** True while a thread of the process is in a system call on an open file with this name. Never waits for the file. */
export async function isInCallOn(pid: number, name: RegExp): Promise<boolean> {
  for (const thread of await readdir(`/proc/${pid}/task`).catch(() => [])) {
    // Source: proc(5): the number of the call, then its arguments, of which a file is the first.
    const call = await readFile(`/proc/${pid}/task/${thread}/syscall`, "latin1").catch(() => "");
    const file = Number.parseInt(call.split(" ")[1] ?? "", 16);
    if (name.test(await readlink(`/proc/${pid}/fd/${file}`).catch(() => ""))) return true;
  }
  return false;
}

export interface Walk extends ProgramResult {
  /** "before job_init", "after job_init"... up to the point where it was stopped. */
  readonly boundaries: readonly string[];
}

/**
 * Lets a program that was started with --step go from boundary to boundary; at `target` it calls `act` and then lets
 * the program run freely. Without a target it goes on to the end.
 */
export async function walk(program: Program, target?: string, act?: () => Promise<void>): Promise<Walk> {
  const boundaries: string[] = [];
  const { stdin } = program.child;
  stdin?.on("error", () => undefined); // it was killed
  let hasEnded = false;
  void program.result.then(() => {
    hasEnded = true;
  });
  while (!hasEnded) {
    // Counted here, because a forked child of the program stops too.
    const next = program.lines.filter((line) => line.startsWith("AT "))[boundaries.length];
    if (next === undefined) {
      await sleep(STEP_POLL_MS);
      continue;
    }
    const boundary = next.slice("AT ".length);
    boundaries.push(boundary);
    if (boundary === target) {
      await act?.();
      stdin?.end();
      break;
    }
    stdin?.write("\n");
  }
  return { ...(await program.result), boundaries };
}

/** What an administrator should never have to read in a task log. */
const NOISE = [
  / at \S*perl-shim\/\S+ line \d+/,
  /^\s+at .*\(.*:\d+:\d+\)/m,
  /undefined|\[object Object\]|\bNaN\b/,
  /Internal error/,
];

/**
 * Checks that one sentence gives the reason why the guest's backup failed, in PVE's own line.
 * | @param sentence what it must say
 * @returns the whole sentence
 */
export function expectFailure({ output, status }: ProgramResult, sentence: RegExp): string {
  expect(status, output).not.toBe(0);
  for (const noise of NOISE) expect(output).not.toMatch(noise);
  const reasons = output
    .split("\n")
    .map((line) => /^ERROR: (?:Backup of VM \d+ failed|Backup job failed|restore failed) - (.*)$/.exec(line)?.[1])
    .filter((reason) => reason !== undefined);
  expect(reasons.length, output).toBeGreaterThan(0);
  expect(reasons[0], output).toMatch(sentence);
  return reasons[0] ?? "";
}
