// SPDX-License-Identifier: AGPL-3.0-or-later
// What the stages of a VM and of a container share: the steps to the place of a kill, the processes that must end
// with the job, and the traces that it must not leave.
import { readdir, readFile } from "node:fs/promises";
import path from "node:path";
import { expect } from "vitest";
import type { Program } from "../programs/scripted-pve.ts";
import {
  descendantsOf,
  eventually,
  isInCallOn,
  isNode,
  type SeenProcess,
  survivorsOf,
  type Walk,
  walk,
} from "./kill-stage.ts";

interface StageNode {
  /** All files of the test are below it. */
  readonly dir: string;
  /** Stands for / of the node. */
  readonly root: string;
  readonly storePath: string;
}

/** The name of a process as the kernel stores it. */
const asKept = (name: string): string => name.slice(0, 15);

export abstract class GuestStage<Judged extends Walk> implements AsyncDisposable {
  abstract readonly node: StageNode;
  readonly #vmid: number;
  readonly #watched: SeenProcess[] = [];
  readonly #halted: number[] = [];

  protected constructor(vmid: number) {
    this.#vmid = vmid;
  }

  /** What must be true of the store after a job, however it ended. */
  abstract judge(walked: Walk): Promise<Judged>;

  abstract [Symbol.asyncDispose](): Promise<void>;

  /** Steps a program to a boundary, and acts there; without a boundary it goes on to the end. */
  async walkTo(program: Program, boundary?: string, act?: () => Promise<void> | void): Promise<Walk> {
    const walked = await walk(program, boundary, async () => {
      await this.watchProcessesOf(program);
      await act?.();
    });
    if (boundary !== undefined) expect(walked.boundaries.at(-1), walked.output).toBe(boundary);
    return walked;
  }

  /** The same, and then checks what is in the store. */
  async killAt(program: Program, boundary?: string, act?: () => Promise<void> | void): Promise<Judged> {
    return await this.judge(await this.walkTo(program, boundary, act));
  }

  /** Steps to a boundary, stops a process there, and lets the program go on without an answer from it. */
  async haltAt(
    program: Program,
    boundary: string,
    name: string,
    before: () => Promise<unknown> = async () => undefined,
  ): Promise<{ readonly halted: number; readonly walked: Promise<Walk> }> {
    let report: (pid: number) => void = () => undefined;
    const halted = new Promise<number>((resolve) => {
      report = resolve;
    });
    const walked = this.walkTo(program, boundary, async () => {
      await before();
      const { pid } = await this.findNamed(program, name);
      process.kill(pid, "SIGSTOP");
      this.#halted.push(pid);
      report(pid);
    });
    return { halted: await Promise.race([halted, walked.then(() => halted)]), walked };
  }

  /** After a failure a process may still be stopped, and others wait for it: they would outlive the test. */
  protected continueHalted(): void {
    for (const pid of this.#halted.splice(0)) {
      try {
        process.kill(pid, "SIGCONT");
      } catch {} // it has ended, as it should
    }
  }

  /** What dead jobs left in the store, on the node, and in the kernel's table of mounts. */
  async leftovers(): Promise<string[]> {
    const folder = path.join(this.node.storePath, String(this.#vmid));
    const inStore = (await readdir(folder)).filter((name) => name.startsWith(".") && name !== ".locks");
    const inLocks = await readdir(path.join(folder, ".locks")).catch(() => []);
    const inRun = await readdir(path.join(this.node.root, "run/pve-backup-host")).catch(() => []);
    const mounts = (await readFile("/proc/self/mounts", "utf8")).split("\n");
    return [...inStore, ...inLocks, ...inRun, ...mounts.filter((line) => line.includes(this.node.dir))];
  }

  /** The processes that watchProcessesOf() noted. */
  async expectNoSurvivors(): Promise<void> {
    expect(await survivorsOf(this.#watched.splice(0))).toEqual([]);
  }

  /** Checks that none of them outlives the job. */
  async watchProcessesOf(program: Program): Promise<void> {
    this.#watched.push(...(await descendantsOf(program.child.pid as number)));
  }

  /** Waits for a process of the job. */
  async find(
    program: Program,
    what: string,
    is: (one: SeenProcess, parent: number) => Promise<boolean> | boolean,
  ): Promise<SeenProcess> {
    const parent = program.child.pid as number;
    return await eventually(what, async () => {
      const { exitCode, signalCode } = program.child;
      if (exitCode !== null || signalCode !== null) throw new Error(`no ${what} in:\n${program.lines.join("\n")}`);
      for (const one of await descendantsOf(parent)) if (await is(one, parent)) return one;
      return undefined;
    });
  }

  /** Waits for a process by its name. */
  async findNamed(program: Program, name: string): Promise<SeenProcess> {
    return await this.find(program, name, (one) => one.name === asKept(name));
  }

  /** Waits for a process with this name that is in a system call on an open file with the given name. */
  async findInCall(program: Program, name: string, file: RegExp): Promise<SeenProcess> {
    const isIt = async (one: SeenProcess): Promise<boolean> =>
      one.name === asKept(name) && (await isInCallOn(one.pid, file));
    return await this.find(program, `${name} in a call on ${file}`, isIt);
  }

  /** The Node that owns the store, or serves a restore. */
  async nodeOf(program: Program): Promise<SeenProcess> {
    return await this.find(program, "Node", (one, parent) => isNode(one) && one.parent === parent);
  }
}
