// SPDX-License-Identifier: AGPL-3.0-or-later
// A program as a child that cannot outlive this process: util-linux' setpriv asks the kernel to end it when this
// process dies, even by SIGKILL. It runs in the C locale and in its own session, and its stderr is kept.
import { type ChildProcess as NodeChild, type StdioOptions, spawn } from "node:child_process";
import { once } from "node:events";
import type { Readable, Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import {
  ChildProcessError,
  EnvironmentError,
  type HostError,
  oneLine,
  shortenMiddle,
  shortPath,
  toText,
} from "../core/index.ts";
import { onLines } from "./lines.ts";
import { readProcess } from "./process-identity.ts";

/** The number under which a child sees its first lent descriptor. */
export const FIRST_LENT_FD = 3;

const END_TIMEOUT_MS = 2_000;
const KILL_TIMEOUT_MS = 5_000;
const MAX_STDERR_CHARS = 4_096;
const MAX_REASON_CHARS = 500;
const DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

export interface ChildOptions {
  /** Working directory; it must exist. Default: this process's. */
  readonly cwd?: string;
  /**
   * Descriptors 0 and 1, then those that are lent, from FIRST_LENT_FD on. File numbers are lent for the start only;
   * "pipe" on 0 and 1 appears as `stdin` and `stdout`. Default: "ignore".
   */
  readonly stdio?: readonly ("ignore" | "pipe" | number)[];
  /** Gets each line as text, and as its bytes ("latin1"): a file name need not be UTF-8. */
  readonly onStderrLine?: (line: string, bytes: string) => void;
  /** More flags of setpriv, for a program that reads what others have made. */
  readonly setprivFlags?: readonly string[];
  /** The signal that ends it when it is disposed; SIGKILL follows after a while. Default: TERM. */
  readonly endBy?: "TERM" | "KILL";
  /**
   * The signal that the kernel sends when this process dies. Default: KILL, which ends a stopped program, too. TERM is
   * for servers that have a mount to release.
   */
  readonly orphanedBy?: "TERM" | "KILL";
}

export class ChildProcess implements AsyncDisposable {
  readonly name: string;
  readonly pid: number;
  /** Resolves when the process is gone and everything that it wrote has been read. */
  readonly exited: Promise<void>;
  readonly #child: NodeChild;
  readonly #endBy: "TERM" | "KILL";
  #stderr = "";
  #lastLine = "";
  #hasExited = false;

  private constructor(name: string, child: NodeChild, pid: number, { endBy = "TERM", onStderrLine }: ChildOptions) {
    this.name = name;
    this.pid = pid;
    this.#child = child;
    this.#endBy = endBy;
    this.exited = new Promise((resolve) => {
      // Not "exit": that may come before the last output on stderr.
      child.once("close", () => {
        this.#hasExited = true;
        resolve();
      });
    });
    child.on("error", () => undefined); // a failed kill(); the close event reports the rest
    if (child.stderr === null) return;
    onLines(child.stderr, (bytes) => this.#addLine(bytes, onStderrLine), "latin1");
    child.stderr.on("data", (bytes: string) => {
      this.#stderr = (this.#stderr + bytes).slice(-MAX_STDERR_CHARS);
    });
  }

  /**
   * Starts `command`, found by PATH, in its own session, so that Ctrl-C in a terminal reaches this process alone.
   * Must be called on the main thread: the kernel binds its promise to the thread that forks.
   *
   * @throws ChildProcessError if setpriv cannot be started; if `command` is missing, the child exits
   */
  static async start(command: string, args: readonly string[], options: ChildOptions = {}): Promise<ChildProcess> {
    const { cwd, stdio = [], setprivFlags = [], orphanedBy = "KILL" } = options;
    const descriptors: StdioOptions = [stdio[0] ?? "ignore", stdio[1] ?? "ignore", "pipe", ...stdio.slice(2)];
    const child = spawn("setpriv", ["--pdeathsig", orphanedBy, ...setprivFlags, "--", command, ...args], {
      ...(cwd === undefined ? {} : { cwd }),
      detached: true,
      stdio: descriptors,
      env: { PATH: process.env.PATH ?? DEFAULT_PATH, LC_ALL: "C", TZ: "UTC" },
    });
    try {
      await once(child, "spawn");
    } catch (cause) {
      throw new ChildProcessError(
        `Cannot start ${JSON.stringify(command)}: setpriv or the working directory was not found`,
        { cause, hint: "install the package util-linux" },
      );
    }
    if (child.pid === undefined) throw new ChildProcessError(`Cannot start ${JSON.stringify(command)}: it has no pid`);
    return new ChildProcess(command, child, child.pid, options);
  }

  get stdin(): Writable | null {
    return this.#child.stdin;
  }

  get stdout(): Readable | null {
    return this.#child.stdout;
  }

  get hasExited(): boolean {
    return this.#hasExited;
  }

  /** Exit status; null after a signal or while it runs. */
  get exitCode(): number | null {
    return this.#child.exitCode;
  }

  /** As hasExited, but asks the kernel, which knows first: a reader of its output can see the end before Node does. */
  async hasEnded(): Promise<boolean> {
    if (this.#hasExited) return true;
    if ((await readProcess(this.pid)) !== undefined) return false;
    await this.#waitForExit(END_TIMEOUT_MS);
    return true;
  }

  /** Waits for its end, for a bounded time: a process that is dying closes its files before it is gone. */
  async endsWithin(timeoutMs: number): Promise<boolean> {
    await this.#waitForExit(timeoutMs);
    return this.#hasExited;
  }

  /** Stops (SIGSTOP) or continues (SIGCONT) the process. */
  send(signal: "SIGSTOP" | "SIGCONT"): void {
    if (!this.#hasExited) this.#child.kill(signal);
  }

  /** For a server, once it serves: what it said before that does not explain why it ends later. */
  forgetOutput(): void {
    this.#stderr = "";
    this.#lastLine = "";
  }

  /** How it ended, with everything that it said last; for messages about a program that should not end. */
  describeExit(): string {
    const said = oneLine(toText(this.#stderr)).slice(-MAX_REASON_CHARS);
    const how = this.#how(`ended with status ${this.#child.exitCode ?? "unknown"}`);
    return said === "" ? how : `${how}: ${said}`;
  }

  /** @returns why it failed: `Cannot <act> "<thing>": tar ended with status 2: <what it said>` */
  failure(act: string, thing: string, said: string = this.#lastLine): HostError {
    const { exitCode } = this.#child;
    const how = this.#how(exitCode === 0 ? "did not do all" : `ended with status ${exitCode ?? "unknown"}`);
    const reason = shortenMiddle(oneLine(said), MAX_REASON_CHARS); // a long path, then "Permission denied"
    const what = `${act} ${JSON.stringify(shortPath(thing))}`;
    const message = `Cannot ${what}: ${this.name} ${how}${reason === "" ? "" : `: ${reason}`}`;
    if (/no space left on device/i.test(said)) return new EnvironmentError(message, { errno: "ENOSPC" });
    if (exitCode === 127 || /^setpriv: failed to execute/.test(said)) {
      return new ChildProcessError(message, { hint: `install the program ${this.name}` });
    }
    return new ChildProcessError(message);
  }

  /** Ends the process: by its signal, then by SIGKILL. Gives up after a bounded time; a second call does nothing. */
  async [Symbol.asyncDispose](): Promise<void> {
    const steps = [[`SIG${this.#endBy}`, END_TIMEOUT_MS] as const, ["SIGKILL", KILL_TIMEOUT_MS] as const];
    for (const [signal, timeoutMs] of steps) {
      if (this.#hasExited) break;
      this.#child.kill(signal);
      this.#child.kill("SIGCONT"); // a stopped process does not act on SIGTERM
      this.#child.stdout?.destroy(); // nothing reads it any more, and "close" waits for it
      this.#child.stdin?.destroy();
      await this.#waitForExit(timeoutMs);
    }
    this.#child.stderr?.destroy();
    this.#child.unref();
  }

  #addLine(bytes: string, onStderrLine: ChildOptions["onStderrLine"]): void {
    const line = toText(bytes);
    if (line.trim() !== "") this.#lastLine = line;
    onStderrLine?.(line, bytes);
  }

  #how(ended: string): string {
    const { signalCode } = this.#child;
    return signalCode === null ? ended : `was ended by ${signalCode}`;
  }

  async #waitForExit(timeoutMs: number): Promise<void> {
    const timer = new AbortController();
    const timeout = sleep(timeoutMs, undefined, { signal: timer.signal }).catch(() => undefined);
    await Promise.race([this.exited, timeout]);
    timer.abort();
  }
}
