// SPDX-License-Identifier: AGPL-3.0-or-later
// A long-running tool as a child that can not outlive us: util-linux' setpriv asks the kernel to end it
// when this process dies, also by SIGKILL.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { ChildProcessError, oneLine } from "../core/index.ts";
import { readProcess } from "../host/index.ts";

/** The number that a child sees its first lent descriptor under. */
export const FIRST_LENT_FD = 3;

const TERM_TIMEOUT_MS = 2_000;
const KILL_TIMEOUT_MS = 2_000;
const MAX_STDERR_CHARS = 4_096;
const MAX_REASON_CHARS = 500;

export interface MoreOptions {
  /** Open files that it inherits, from number 3 on. */
  readonly files?: readonly number[];
  /** More flags of setpriv. */
  readonly setprivFlags?: readonly string[];
  /** With which signal it is ended, also when we die. Default: SIGTERM; after a while, SIGKILL. */
  readonly endBy?: "TERM" | "KILL";
}

export class ToolProcess implements AsyncDisposable {
  readonly name: string;
  readonly pid: number;
  readonly #child: ChildProcess;
  readonly #endBy: "TERM" | "KILL";
  readonly #exited: Promise<void>;
  #stderr = "";
  #hasExited = false;

  private constructor(name: string, child: ChildProcess, pid: number, endBy: "TERM" | "KILL") {
    this.name = name;
    this.pid = pid;
    this.#child = child;
    this.#endBy = endBy;
    this.#exited = new Promise((resolve) => {
      // Not "exit": that may come before the last words on stderr.
      child.once("close", () => {
        this.#hasExited = true;
        resolve();
      });
    });
    child.on("error", () => undefined); // a failed kill(); the exit event tells the rest
    child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-MAX_STDERR_CHARS);
    });
  }

  /**
   * Starts `command` in a session of its own, so that Ctrl-C in a terminal reaches us and not it.
   * Must be called on the main thread: the kernel's promise is bound to the thread that forks.
   *
   * @param cwd working directory; it must exist
   * @throws ChildProcessError if setpriv cannot be started; a missing `command` shows as its exit
   */
  static async start(
    command: string,
    args: readonly string[],
    cwd: string,
    { files = [], setprivFlags = [], endBy = "TERM" }: MoreOptions = {},
  ): Promise<ToolProcess> {
    const child = spawn("setpriv", ["--pdeathsig", endBy, ...setprivFlags, "--", command, ...args], {
      cwd,
      detached: true,
      stdio: ["ignore", "ignore", "pipe", ...files],
      env: { ...process.env, LC_ALL: "C" },
    });
    try {
      await once(child, "spawn");
    } catch (cause) {
      throw new ChildProcessError(`Cannot start "setpriv": it is missing or not executable`, {
        cause,
        hint: "install the package util-linux",
      });
    }
    if (child.pid === undefined) throw new ChildProcessError(`Cannot start ${JSON.stringify(command)}: it has no pid`);
    return new ToolProcess(command, child, child.pid, endBy);
  }

  get hasExited(): boolean {
    return this.#hasExited;
  }

  /** Once it serves: what it said on the way there is no reason for a later end. */
  forgetOutput(): void {
    this.#stderr = "";
  }

  /** As hasExited, but asks the kernel, which knows first: a reader that met the end may be here before the news. */
  async hasEnded(): Promise<boolean> {
    if (this.#hasExited) return true;
    if ((await readProcess(this.pid)) !== undefined) return false;
    await this.#waitForExit(KILL_TIMEOUT_MS);
    return true;
  }

  /** Why it is gone, with what it last said; for messages. */
  describeExit(): string {
    const { exitCode, signalCode } = this.#child;
    const how = signalCode === null ? `ended with status ${exitCode ?? "unknown"}` : `was ended by ${signalCode}`;
    const said = oneLine(this.#stderr).slice(-MAX_REASON_CHARS);
    return said === "" ? how : `${how}: ${said}`;
  }

  /** Ends the process: by its signal, then by SIGKILL. Gives up after a bounded time; repeating does nothing. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const [signal, timeoutMs] of [
      [`SIG${this.#endBy}`, TERM_TIMEOUT_MS] as const,
      ["SIGKILL", KILL_TIMEOUT_MS] as const,
    ]) {
      if (this.#hasExited) break;
      this.#child.kill(signal);
      await this.#waitForExit(timeoutMs);
    }
    this.#child.stderr?.destroy();
    this.#child.unref();
  }

  async #waitForExit(timeoutMs: number): Promise<void> {
    const timer = new AbortController();
    const timeout = sleep(timeoutMs, undefined, { signal: timer.signal }).catch(() => undefined);
    await Promise.race([this.#exited, timeout]);
    timer.abort();
  }
}
