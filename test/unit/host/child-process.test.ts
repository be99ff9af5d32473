// SPDX-License-Identifier: AGPL-3.0-or-later
// Programs as real children; a shell plays them.
import { execFile } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { mkdtemp, open, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { text } from "node:stream/consumers";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { until } from "../../../fixtures/lab/index.ts";
import { EnvironmentError } from "../../../src/core/index.ts";
import { type ChildOptions, ChildProcess } from "../../../src/host/index.ts";
import { bundleInto } from "../../support/programs/bundle.ts";
import { requireTool } from "../../support/programs/tools.ts";

let dir: string;
let started: ChildProcess[];

beforeEach(async (context) => {
  requireTool(context, "setpriv");
  dir = await mkdtemp(path.join(tmpdir(), "child-process-"));
  started = [];
});

afterEach(async () => {
  for (const child of started) await child[Symbol.asyncDispose]();
  await rm(dir, { recursive: true, force: true });
});

async function start(script: string, options: ChildOptions = {}): Promise<ChildProcess> {
  const child = await ChildProcess.start("sh", ["-c", script], { cwd: dir, ...options });
  started.push(child);
  return child;
}

/** The state letter of /proc/PID/stat: "S" sleeping, "T" stopped. */
const stateOf = (pid: number): string | undefined => /\) (\w)/.exec(readFileSync(`/proc/${pid}/stat`, "utf8"))?.[1];

const isThere = (pid: number): boolean => existsSync(`/proc/${pid}`);

describe("ChildProcess.start()", () => {
  it("runs the program in the C locale, in UTC, with no more of our environment than PATH", async () => {
    const child = await ChildProcess.start("env", [], { stdio: ["ignore", "pipe"] });
    started.push(child);
    if (child.stdout === null) throw new Error("no stdout");
    const lines = (await text(child.stdout)).trim().split("\n").sort();
    expect(lines).toEqual(["LC_ALL=C", `PATH=${process.env.PATH}`, "TZ=UTC"]);
  });

  it("runs the program in its own session", async () => {
    const child = await start("read _; exit 0", { stdio: ["pipe"] });
    const session = readFileSync(`/proc/${child.pid}/stat`, "utf8").split(") ")[1]?.split(" ")[3];
    expect(Number(session)).toBe(child.pid);
  });

  it("lends descriptors from 3 on", async () => {
    await writeFile(path.join(dir, "a"), "first");
    await writeFile(path.join(dir, "b"), "second");
    await using a = await open(path.join(dir, "a"));
    await using b = await open(path.join(dir, "b"));
    const child = await start("cat <&3; cat <&4", { stdio: ["ignore", "pipe", a.fd, b.fd] });
    if (child.stdout === null) throw new Error("no stdout");
    expect(await text(child.stdout)).toBe("firstsecond");
  });

  it("names the program and the missing package if it cannot be started", async () => {
    const starting = start("exit 0", { cwd: path.join(dir, "missing") });
    await expect(starting).rejects.toMatchObject({
      message: 'Cannot start "sh": setpriv or the working directory was not found',
      hint: "install the package util-linux",
    });
  });

  it("hands on each line of stderr as text and as bytes", async () => {
    const lines: [string, string][] = [];
    const onStderrLine = (line: string, bytes: string): void => void lines.push([line, bytes]);
    const child = await start("printf 'caf\\303\\251\\nbad \\377\\n' >&2", { onStderrLine });
    await child.exited;
    expect(lines).toEqual([
      ["café", "caf\u00c3\u00a9"],
      ["bad \ufffd", "bad \u00ff"],
    ]);
  });

  it.each([
    ["the default", undefined, "KILL"],
    ["TERM", "TERM", "TERM"],
  ] as const)("asks the kernel to end the program with this process, by %s", async (_name, orphanedBy, signal) => {
    // A child of a child: this process's own death is none that a test survives.
    const program = path.join(dir, "parent.ts");
    const host = path.resolve(import.meta.dirname, "../../../src/host/index.ts");
    const script = `trap 'echo TERM > ended; exit 0' TERM; echo $$ > pid; while :; do sleep 0.05; done`;
    const options = { cwd: dir, ...(orphanedBy === undefined ? {} : { orphanedBy }) };
    await writeFile(
      program,
      `import { ChildProcess } from ${JSON.stringify(host)};
       await ChildProcess.start("sh", ["-c", ${JSON.stringify(script)}], ${JSON.stringify(options)});`,
    );
    await bundleInto(path.join(dir, "parent.mjs"), program);
    const parent = execFile(process.execPath, [path.join(dir, "parent.mjs")]);
    await until("the program runs", () => existsSync(path.join(dir, "pid")));
    await until("its pid is written", () => readFileSync(path.join(dir, "pid"), "utf8").endsWith("\n"));
    const pid = Number(readFileSync(path.join(dir, "pid"), "utf8"));
    parent.kill("SIGKILL");
    await until("the program ends", () => !isThere(pid));
    expect(existsSync(path.join(dir, "ended"))).toBe(signal === "TERM");
  });
});

describe("ChildProcess.describeExit()", () => {
  const speaker = "echo is now connected to json: >&2; until [ -e go ]; do sleep 0.05; done; echo lost it >&2; exit 3";

  async function startSpeaker(): Promise<ChildProcess> {
    const child = await start(speaker);
    await until("the program has spoken", () => child.describeExit().includes("connected to json:"));
    return child;
  }

  it("tells the status, and all that was said", async () => {
    const child = await startSpeaker();
    await writeFile(path.join(dir, "go"), "");
    await child.exited;
    expect(child.describeExit()).toBe("ended with status 3: is now connected to json: lost it");
  });

  it("tells what was said since the output was forgotten", async () => {
    const child = await startSpeaker();
    child.forgetOutput();
    await writeFile(path.join(dir, "go"), "");
    await child.exited;
    expect(child.describeExit()).toBe("ended with status 3: lost it");
  });

  it("tells the signal alone when nothing was said since", async () => {
    const child = await startSpeaker();
    child.forgetOutput();
    process.kill(child.pid, "SIGKILL");
    await child.exited;
    expect(child.describeExit()).toBe("was ended by SIGKILL");
  });

  it("keeps the end of what a program says without end", async () => {
    const child = await start("yes 0123456789 | head -c 100000 >&2; echo the end >&2; exit 1");
    await child.exited;
    expect(child.describeExit()).toMatch(/^ended with status 1: .{400,500}the end$/);
    expect(child.describeExit().length).toBeLessThan(600);
  });
});

describe("ChildProcess.failure()", () => {
  it("tells the status and the last line", async () => {
    const child = await start("echo one >&2; echo two >&2; echo >&2; exit 2");
    await child.exited;
    expect(child.failure("list", "/a").message).toBe('Cannot list "/a": sh ended with status 2: two');
  });

  it("tells what the caller heard instead", async () => {
    const child = await start("echo one >&2; exit 0");
    await child.exited;
    expect(child.failure("list", "/a", "why").message).toBe('Cannot list "/a": sh did not do all: why');
  });

  it("keeps the reason behind a long path", async () => {
    const long = `/srv/${"a/".repeat(2_000)}file`;
    const child = await start(`echo 'sh: ${long}: Permission denied' >&2; exit 2`);
    await child.exited;
    const { message } = child.failure("list", long);
    expect(message).toMatch(/^Cannot list "\/srv\/a.*….*a\/file": sh ended with status 2: sh: \/srv\/a.*…/);
    expect(message).toMatch(/\/file: Permission denied$/);
    expect(message.length).toBeLessThan(800);
  });

  it("tells a full disk as the system's error", async () => {
    const child = await start("echo 'sh: write error: No space left on device' >&2; exit 2");
    await child.exited;
    const failure = child.failure("write", "/a");
    expect(failure).toBeInstanceOf(EnvironmentError);
    expect(failure).toMatchObject({ errno: "ENOSPC" });
  });

  it("says which program to install", async () => {
    const child = await ChildProcess.start("no-such-program", [], { cwd: dir });
    await child.exited;
    expect(child.failure("read", "/a").hint).toBe("install the program no-such-program");
  });
});

describe("ChildProcess.hasEnded()", () => {
  it("knows an end that Node has not heard of", async () => {
    const child = await start("exec sleep 60");
    expect(await child.hasEnded()).toBe(false);
    process.kill(child.pid, "SIGKILL");
    // Nothing here lets Node's event loop turn; the kernel has the process as a zombie at once.
    const spinUntil = performance.now() + 5_000;
    while (stateOf(child.pid) !== "Z" && performance.now() < spinUntil);
    expect(child.hasExited).toBe(false);
    expect(await child.hasEnded()).toBe(true);
    expect(child.hasExited).toBe(true);
  });
});

describe("ChildProcess.send()", () => {
  it("stops and continues the program", async () => {
    const child = await start("while :; do sleep 0.01; done");
    child.send("SIGSTOP");
    await until("it stops", () => stateOf(child.pid) === "T");
    child.send("SIGCONT");
    await until("it runs on", () => stateOf(child.pid) !== "T");
  });
});

describe("ChildProcess[Symbol.asyncDispose]()", () => {
  it("lets the program end by itself, on SIGTERM", async () => {
    const child = await start("trap 'echo bye >&2; exit 4' TERM; echo up >&2; while :; do sleep 0.05; done");
    await until("it is up", () => child.describeExit().includes("up"));
    await child[Symbol.asyncDispose]();
    expect(child.describeExit()).toBe("ended with status 4: up bye");
    await child[Symbol.asyncDispose]();
  });

  it("ends a program that takes no SIGTERM", async () => {
    const child = await start("trap '' TERM; echo up >&2; while :; do sleep 0.05; done");
    await until("it is up", () => child.describeExit().includes("up"));
    await child[Symbol.asyncDispose]();
    expect(child.hasExited).toBe(true);
    expect(child.describeExit()).toContain("was ended by SIGKILL");
  });

  it("ends at once a program that must not see SIGTERM", async () => {
    const child = await start("trap 'touch seen' TERM; echo up >&2; while :; do sleep 0.05; done", { endBy: "KILL" });
    await until("it is up", () => child.describeExit().includes("up"));
    await child[Symbol.asyncDispose]();
    expect(child.describeExit()).toBe("was ended by SIGKILL: up");
    expect(existsSync(path.join(dir, "seen"))).toBe(false);
  });

  it("ends a stopped program by SIGTERM", async () => {
    const child = await start("trap 'exit 5' TERM; echo up >&2; while :; do sleep 0.05; done");
    await until("it is up", () => child.describeExit().includes("up"));
    child.send("SIGSTOP");
    await until("it stops", () => stateOf(child.pid) === "T");
    await child[Symbol.asyncDispose]();
    expect(child.describeExit()).toBe("ended with status 5: up");
  });

  it("ends a program whose output nothing reads", async () => {
    const child = await start("exec yes", { stdio: ["ignore", "pipe"] });
    await child[Symbol.asyncDispose]();
    expect(child.hasExited).toBe(true);
  });
});
