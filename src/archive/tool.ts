// SPDX-License-Identifier: AGPL-3.0-or-later
// A program as a child that can not outlive us: util-linux' setpriv asks the kernel to end it when this
// process dies, also by SIGKILL. What it says on stderr arrives line by line.
import { type ChildProcess, type StdioOptions, spawn } from "node:child_process";
import { once } from "node:events";
import type { Readable, Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { ChildProcessError, EnvironmentError, type HostError, oneLine } from "../core/index.ts";
import { toText } from "./bytes.ts";

const TERM_TIMEOUT_MS = 2_000;
const KILL_TIMEOUT_MS = 5_000;
const MAX_LINE_CHARS = 8_192;
const MAX_REASON_CHARS = 500;
const DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

export interface ToolOptions {
  /** Must exist and be reachable by us. */
  readonly cwd?: string;
  /** File numbers are lent for the start only; "pipe" on 0 and 1 shows as `stdin` and `stdout`. */
  readonly stdio: readonly ("ignore" | "pipe" | number)[];
  /** Gets each line as text, and as its bytes ("latin1"): a file name need not be UTF-8. */
  readonly onStderrLine?: (line: string, bytes: string) => void;
  /** More flags of setpriv, for a program that reads what others made. */
  readonly setprivFlags?: readonly string[];
}

export class Tool implements AsyncDisposable {
  readonly name: string;
  readonly pid: number;
  /** Resolves when the process is gone and all it wrote is read. */
  readonly exited: Promise<void>;
  readonly #child: ChildProcess;
  #lastLine = "";
  #hasExited = false;

  private constructor(name: string, child: ChildProcess, pid: number, onLine: (line: string, bytes: string) => void) {
    this.name = name;
    this.pid = pid;
    this.#child = child;
    this.exited = new Promise((resolve) => {
      child.once("close", () => {
        this.#hasExited = true;
        resolve();
      });
    });
    child.on("error", () => undefined); // a failed kill(); the close event tells the rest
    if (child.stderr !== null) {
      const onBytes = (bytes: string): void => {
        const line = toText(bytes);
        if (line.trim() !== "") this.#lastLine = line;
        onLine(line, bytes);
      };
      onLines(child.stderr, onBytes, "latin1");
    }
  }

  /**
   * Starts `command`, found by PATH, in the C locale and in a session of its own (Ctrl-C reaches only us).
   * Must be called on the main thread: the kernel's promise is bound to the thread that forks.
   *
   * @throws ChildProcessError if setpriv cannot be started; a missing `command` shows as its exit
   */
  static async start(command: string, args: readonly string[], options: ToolOptions): Promise<Tool> {
    const stdio: StdioOptions = [options.stdio[0] ?? "ignore", options.stdio[1] ?? "ignore", "pipe"];
    stdio.push(...options.stdio.slice(2));
    const child = spawn("setpriv", ["--pdeathsig", "KILL", ...(options.setprivFlags ?? []), "--", command, ...args], {
      ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
      detached: true,
      stdio,
      env: { PATH: process.env.PATH ?? DEFAULT_PATH, LC_ALL: "C", TZ: "UTC" },
    });
    try {
      await once(child, "spawn");
    } catch (cause) {
      throw new ChildProcessError(`Cannot start ${JSON.stringify(command)}: setpriv or the working folder is missing`, {
        cause,
        hint: "install the package util-linux",
      });
    }
    if (child.pid === undefined) throw new ChildProcessError(`Cannot start ${JSON.stringify(command)}: it has no pid`);
    return new Tool(command, child, child.pid, options.onStderrLine ?? (() => undefined));
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

  /** Exit status; null after a signal, or while it runs. */
  get exitCode(): number | null {
    return this.#child.exitCode;
  }

  /** Stops (SIGSTOP) or continues (SIGCONT) the process. */
  send(signal: "SIGSTOP" | "SIGCONT"): void {
    if (!this.#hasExited) this.#child.kill(signal);
  }

  /** @returns why it failed: `Cannot <act> "<thing>": tar ended with status 2: <what it said>` */
  failure(act: string, thing: string, said: string = this.#lastLine): HostError {
    const { exitCode, signalCode } = this.#child;
    const ended = exitCode === 0 ? "did not do all" : `ended with status ${exitCode ?? "unknown"}`;
    const how = signalCode === null ? ended : `was ended by ${signalCode}`;
    const reason = oneLine(said).slice(0, MAX_REASON_CHARS);
    const message = `Cannot ${act} ${JSON.stringify(thing)}: ${this.name} ${how}${reason === "" ? "" : `: ${reason}`}`;
    if (/no space left on device/i.test(said)) return new EnvironmentError(message, { errno: "ENOSPC" });
    if (exitCode === 127 || /^setpriv: failed to execute/.test(said)) {
      return new ChildProcessError(message, { hint: `install the program ${this.name}` });
    }
    return new ChildProcessError(message);
  }

  /** Ends the process: SIGTERM, then SIGKILL. Gives up after a bounded time; repeating does nothing. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const [signal, timeoutMs] of [["SIGTERM", TERM_TIMEOUT_MS] as const, ["SIGKILL", KILL_TIMEOUT_MS] as const]) {
      if (this.#hasExited) break;
      this.#child.kill(signal);
      this.#child.kill("SIGCONT"); // a stopped process takes no SIGTERM
      this.#child.stdout?.destroy(); // nobody reads on, and "close" waits for it
      this.#child.stdin?.destroy();
      await this.#waitForExit(timeoutMs);
    }
    this.#child.stderr?.destroy();
    this.#child.unref();
  }

  async #waitForExit(timeoutMs: number): Promise<void> {
    const timer = new AbortController();
    const timeout = sleep(timeoutMs, undefined, { signal: timer.signal }).catch(() => undefined);
    await Promise.race([this.exited, timeout]);
    timer.abort();
  }
}

/** Waits for all tools. @throws the abort reason of `signal` at once; disposing the tools is the caller's */
export async function waitForTools(tools: readonly Tool[], signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  let onAbort = (): void => undefined;
  const aborted = new Promise<void>((resolve) => {
    onAbort = () => resolve();
  });
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    await Promise.race([Promise.all(tools.map((tool) => tool.exited)), aborted]);
    signal.throwIfAborted();
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
}

/** Calls `onLine` per line, without the newline; a line without end is cut at a bound. */
export function onLines(stream: Readable, onLine: (line: string) => void, encoding: BufferEncoding = "utf8"): void {
  let rest = "";
  stream.setEncoding(encoding);
  stream.on("data", (text: string) => {
    const lines = (rest + text).split("\n");
    rest = (lines.pop() ?? "").slice(0, MAX_LINE_CHARS);
    for (const line of lines) onLine(line.slice(0, MAX_LINE_CHARS));
  });
  stream.on("end", () => {
    if (rest !== "") onLine(rest);
  });
  stream.on("error", () => undefined);
}
