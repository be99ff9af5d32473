// SPDX-License-Identifier: AGPL-3.0-or-later
// Programs as the bench runs them: timed from start to exit, or serving until they are let go.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { BenchError } from "./work-area.ts";

const START_TIMEOUT_MS = 15_000;
const POLL_MS = 10;

interface Timed {
  /** Wall clock from spawn to exit. */
  readonly ms: number;
  readonly stdout: string;
}

/** Programs get SIGTERM when the bench is gone, however it ended. */
const WITH_US = ["--pdeathsig", "TERM", "--"] as const;

/**
 * Without what this shell's own setup adds: each start of Node reads a file of extra certificates, 0.04 s for a
 * system's whole set. A PVE node sets neither.
 */
const { NODE_EXTRA_CA_CERTS: _certificates, NODE_OPTIONS: _options, ...INHERITED } = process.env;
const ENVIRONMENT = { ...INHERITED, LC_ALL: "C" };

/** Runs a program to its end. @throws BenchError with its stderr if it fails */
export async function runTimed(command: string, args: readonly string[]): Promise<Timed> {
  const startMs = performance.now();
  const child = spawn("setpriv", [...WITH_US, command, ...args], {
    stdio: ["ignore", "pipe", "pipe"],
    env: ENVIRONMENT,
  });
  let stdout = "";
  let stderr = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
  });
  const [code] = (await once(child, "close")) as [number | null];
  const ms = performance.now() - startMs;
  if (code !== 0) throw new BenchError(`${command} ${args.join(" ")} failed: ${(stderr || stdout).trim()}`);
  return { ms, stdout };
}

/** Starts a program that serves until disposed (SIGTERM), and waits until `isReady`. */
export async function startServer(
  command: string,
  args: readonly string[],
  isReady: () => Promise<boolean>,
): Promise<AsyncDisposable> {
  const child = spawn("setpriv", [...WITH_US, command, ...args], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  let stderr = "";
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
  });
  const deadline = performance.now() + START_TIMEOUT_MS;
  while (!(await isReady())) {
    if (!isAlive(child) || performance.now() > deadline) {
      child.kill("SIGKILL");
      throw new BenchError(`${command} does not start: ${stderr.trim()}`);
    }
    await sleep(POLL_MS);
  }
  return {
    async [Symbol.asyncDispose]() {
      if (!isAlive(child)) return;
      child.kill("SIGTERM");
      await once(child, "exit");
    },
  };
}

function isAlive(child: ChildProcess): boolean {
  return child.exitCode === null && child.signalCode === null;
}
