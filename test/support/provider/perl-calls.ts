// SPDX-License-Identifier: AGPL-3.0-or-later
// Any storage type through the shim under perl -T: the hooks of one provider object, and functions of PVE::Storage.
import type { ChildProcessWithoutNullStreams } from "node:child_process";
import { once } from "node:events";
import { writeFile } from "node:fs/promises";
import path from "node:path";
import { createInterface } from "node:readline";
import { type ScriptOptions, startScript } from "../programs/scripted-pve.ts";

interface PerlCallsOptions extends ScriptOptions {
  /** Directory for the job file. */
  readonly dir: string;
  readonly storeid: string;
  readonly scfg: Readonly<Record<string, unknown>>;
  /** Where lines of the task log go. */
  readonly log?: string[];
}

interface Answer {
  readonly log?: string;
  readonly error?: string;
  readonly result?: unknown;
}

/** Rejects with the error that PVE would see, in one line. */
export class PerlCalls implements AsyncDisposable {
  readonly log: string[];
  readonly child: ChildProcessWithoutNullStreams;
  readonly #exit: Promise<unknown[]>;
  #settle: ((answer: Answer) => void) | undefined;

  private constructor(child: ChildProcessWithoutNullStreams, log: string[]) {
    this.child = child;
    this.log = log;
    this.#exit = once(child, "close");
    void this.#exit.then(() => this.#settle?.({ error: "perl has ended\n" }));
    for (const input of [child.stdout, child.stderr]) {
      createInterface({ input }).on("line", (line) => this.#take(line));
    }
  }

  static async start({ dir, storeid, scfg, log = [], ...script }: PerlCallsOptions): Promise<PerlCalls> {
    const jobFile = path.join(dir, "calls.json");
    await writeFile(jobFile, JSON.stringify({ storeid, scfg }));
    return new PerlCalls(startScript("hooks.pl", ["--job", jobFile], script), log);
  }

  hook<Result = unknown>(name: string, ...args: unknown[]): Promise<Result> {
    return this.#ask({ call: [name, ...args] });
  }

  hookList<Result = unknown>(name: string, ...args: unknown[]): Promise<Result> {
    return this.#ask({ call: [name, ...args], list: 1 });
  }

  storage<Result = unknown>(name: string, ...args: unknown[]): Promise<Result> {
    return this.#ask({ storage: [name, ...args] });
  }

  storageList<Result = unknown>(name: string, ...args: unknown[]): Promise<Result> {
    return this.#ask({ storage: [name, ...args], list: 1 });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.child.stdin.end();
    await this.#exit;
  }

  async #ask<Result>(question: object): Promise<Result> {
    const answer = await new Promise<Answer>((resolve) => {
      this.#settle = resolve;
      if (this.child.exitCode !== null || this.child.signalCode !== null) resolve({ error: "perl has ended\n" });
      else this.child.stdin.write(`${JSON.stringify(question)}\n`);
    });
    this.#settle = undefined;
    if (answer.error === undefined) return answer.result as Result;
    // Perl's own messages name a line of code.
    if (!/^[^\n]+\n$/.test(answer.error)) throw new Error(`not one sentence: ${answer.error}`);
    throw new Error(answer.error.trimEnd());
  }

  #take(line: string): void {
    let message: Answer;
    try {
      message = JSON.parse(line) as Answer;
    } catch {
      message = { log: `perl: ${line}` };
    }
    if (message.log !== undefined) this.log.push(message.log);
    else this.#settle?.(message);
  }
}
