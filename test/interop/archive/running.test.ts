// SPDX-License-Identifier: AGPL-3.0-or-later
// An archiver while it works: held to a rate, cancelled, killed, and its files taken away.
import { spawn } from "node:child_process";
import {
  appendFileSync,
  chownSync,
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  readlinkSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it, onTestFinished, vi } from "vitest";
import { until } from "../../../fixtures/lab/index.ts";
import { CancelledError } from "../../../src/core/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import {
  bundleJobRunner,
  HOST_SHIFT,
  inUserNamespace,
  KINDS,
  type Kind,
  makeWorkFolder,
  namesIn,
  run,
  unpack,
  writeArchive,
} from "./support.ts";

const MIB = 1024 * 1024;
const TOOLS = { tar: "tar", squashfs: "mksquashfs" } as const;
const work = makeWorkFolder();
let runner = "";
beforeAll(async () => {
  runner = await bundleJobRunner(work.path);
});
afterAll(() => work[Symbol.dispose]());

/** Files of 1 MiB that neither compress nor repeat: xorshift, seeded. */
function makeFiles(name: string, count: number, owner = 0): string {
  const folder = join(work.path, name);
  mkdirSync(folder);
  const words = new Uint32Array(MIB / 4);
  let state = 0x9e3779b9;
  for (let file = 0; file < count; file++) {
    for (let at = 0; at < words.length; at++) {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      words[at] = state;
    }
    writeFileSync(join(folder, `f${file}`), words);
    chownSync(join(folder, `f${file}`), owner, owner);
  }
  chownSync(folder, owner, owner);
  return folder;
}

/** Pids of processes that work in `folder` or hold a file in it open; not this one. */
function processesIn(folder: string): number[] {
  const isInside = (link: string): boolean => {
    try {
      return readlinkSync(link).startsWith(folder);
    } catch {
      return false;
    }
  };
  return readdirSync("/proc")
    .filter((entry) => /^\d+$/.test(entry) && Number(entry) !== process.pid)
    .filter((pid) => {
      try {
        return (
          isInside(`/proc/${pid}/cwd`) || readdirSync(`/proc/${pid}/fd`).some((fd) => isInside(`/proc/${pid}/fd/${fd}`))
        );
      } catch {
        return false;
      }
    })
    .map(Number);
}

/** Adds a file that keeps mksquashfs busy, also where a busy machine looks at it too late to stop it. */
function addHoles(folder: string, bytes = 64 * 1024 * MIB): void {
  const file = join(folder, "a-file-of-holes"); // it reads the files by their names
  writeFileSync(file, "");
  truncateSync(file, bytes);
  const { uid, gid } = statSync(folder);
  chownSync(file, uid, gid);
}

/** A file of /proc; empty when the process is gone. */
const procFile = (pid: number, name: string): Promise<string> =>
  readFile(`/proc/${pid}/${name}`, "utf8").catch(() => "");

/** Pid of the tool itself, not of what starts it, once it is at work. */
async function toolAtWork(kind: Kind): Promise<number> {
  let found = 0;
  await until(`${TOOLS[kind]} works`, async () => {
    for (const pid of processesIn(work.path)) {
      if ((await procFile(pid, "comm")) === `${TOOLS[kind]}\n`) found = pid;
    }
    return found > 0;
  });
  return found;
}

async function untilGone(folder: string): Promise<number[]> {
  for (let tries = 0; tries < 50 && processesIn(folder).length > 0; tries++) await sleep(50);
  return processesIn(folder);
}

// How exactly mksquashfs is held, which is paced from outside, is for test/unit, with a clock of its own, and for
// `make bench`: a busy machine looks at it too late.
describe("bandwidthLimit", () => {
  it.each(["none", "zstd"] as const)("holds tar with compression %s to the rate", async (compression) => {
    const files = 32;
    const rate = 10 * MIB;
    const name = `rate-tar-${compression}`;
    const directory = makeFiles(name, files);
    const startMs = performance.now();
    await writeArchive("tar", join(work.path, `${name}.a`), { directory, compression, bandwidthLimit: rate });
    const seconds = (performance.now() - startMs) / 1000;
    const wanted = (files * MIB) / rate;
    expect(seconds).toBeGreaterThan(wanted * 0.95);
  });

  it.each(["none", "zstd"] as const)("holds squashfs with compression %s to the rate", async (compression) => {
    const rate = 50 * MIB; // without a limit it reads hundreds
    const name = `rate-squashfs-${compression}`;
    const directory = makeFiles(name, 1);
    addHoles(directory);
    const controller = new AbortController();
    const job = { directory, compression, bandwidthLimit: rate, signal: controller.signal };
    const startMs = performance.now();
    const writing = writeArchive("squashfs", join(work.path, `${name}.a`), job).catch((error: unknown) => error);
    const pid = await toolAtWork("squashfs");
    await sleep(5_000);
    const seconds = (performance.now() - startMs) / 1000;
    const [, readBytes] = /^rchar: (\d+)$/m.exec(await procFile(pid, "io")) ?? [];
    const reason = new CancelledError("enough is read");
    controller.abort(reason);
    expect(await writing).toBe(reason);
    expect(Number(readBytes) / seconds).toBeLessThan(2 * rate);
  });
});

describe("progress", () => {
  it.each(KINDS)("says how far %s is: files, bytes and rates", async (kind) => {
    const directory = makeFiles(`progress-${kind}`, 10);
    // A tool that is not done before the first line comes, after three seconds, however fast the machine is.
    const bin = join(work.path, `bin-${kind}`);
    const { stdout } = await run("which", [TOOLS[kind]]);
    mkdirSync(bin);
    writeFileSync(join(bin, TOOLS[kind]), `#!/bin/sh\nsleep 5\nexec ${stdout.trim()} "$@"\n`, { mode: 0o755 });
    vi.stubEnv("PATH", `${bin}:${process.env.PATH}`);
    onTestFinished(() => void vi.unstubAllEnvs());
    const startMs = performance.now();
    const { log, summary } = await writeArchive(kind, join(work.path, `progress-${kind}.a`), { directory });
    const seconds = (performance.now() - startMs) / 1000;
    const lines = log.filter((line) =>
      /^info container: \d+ files, read: .+, written: .+ in .+s \(read .+\/s/.test(line),
    );
    expect(lines.length).toBeGreaterThan(1); // one after three seconds, then one every ten, and one at the end
    expect(lines.length).toBeLessThanOrEqual(2 + Math.floor((seconds - 3) / 10));
    expect(lines.at(-1)).toContain("container: 11 files, read: 10");
    expect(summary.files).toBe(11);
    expect(Math.abs(summary.bytes - 10 * MIB)).toBeLessThan(MIB);
  });
});

describe("abort", () => {
  it.each([
    ["tar", "none"],
    ["tar", "zstd"],
    ["squashfs", "none"],
  ] as const)("ends %s with compression %s at once and leaves no process", async (kind, compression) => {
    const directory = makeFiles(`abort-${kind}-${compression}`, 8);
    addHoles(directory);
    const controller = new AbortController();
    const out = join(work.path, `abort-${kind}-${compression}.a`);
    // Two minutes, if nobody ends it.
    const job = { directory, compression, bandwidthLimit: MIB / 16, signal: controller.signal };
    const writing = writeArchive(kind, out, job).catch((error: unknown) => error);
    await toolAtWork(kind);
    await sleep(200); // the squashfs one stands still by now
    const reason = new CancelledError("Backup cancelled");
    const startMs = performance.now();
    controller.abort(reason);
    expect(await writing).toBe(reason);
    expect(performance.now() - startMs).toBeLessThan(6_000);
    expect(processesIn(work.path)).toEqual([]);
  });

  it("does not start when it is aborted already", async () => {
    const signal = AbortSignal.abort(new CancelledError("too late"));
    await expect(writeArchive("tar", join(work.path, "late.tar"), { directory: work.path, signal })).rejects.toThrow(
      "too late",
    );
  });

  it.each([
    ["tar", "zstd"],
    ["squashfs", "none"],
  ] as const)(
    "takes %s along when our process in a user namespace is killed",
    async (kind, compression, context?: unknown) => {
      if (context !== undefined) requireTool(context as never, "newuidmap");
      const directory = makeFiles(`killed-${kind}`, 8, HOST_SHIFT);
      addHoles(directory);
      const archive = join(work.path, `killed-${kind}.a`);
      closeSync(openSync(archive, "wx+"));
      chownSync(archive, HOST_SHIFT, HOST_SHIFT);
      const job = JSON.stringify({ directory, compression, bandwidthLimit: MIB });
      const [command, args] = inUserNamespace(work.path, [process.execPath, runner, kind, archive, job]);
      const child = spawn(command, args, { stdio: "ignore" });
      await toolAtWork(kind);
      child.kill("SIGKILL"); // each step exec()s the next: this is Node
      expect(await untilGone(work.path)).toEqual([]);
    },
  );
});

describe("a source that moves", () => {
  it.each([
    ["tar", 8],
    ["squashfs", 1024], // of that it reads two seconds' worth of holes first
  ] as const)("is a warning of %s where files vanish", async (kind, rate) => {
    const directory = makeFiles(`vanish-${kind}`, 12);
    if (kind === "squashfs") addHoles(directory, 2 * rate * MIB);
    const out = join(work.path, `vanish-${kind}.a`);
    const writing = writeArchive(kind, out, { directory, bandwidthLimit: rate * MIB });
    await toolAtWork(kind);
    await sleep(300);
    for (const name of readdirSync(directory)) rmSync(join(directory, name));
    const { summary, log } = await writing;
    const warnings = log.filter((line) => line.startsWith("warn "));
    expect(warnings.filter((line) => /removed before we read it|vanished before it was read/.test(line))).not.toEqual(
      [],
    );
    expect(summary.warnings).toBeGreaterThanOrEqual(Math.min(50, warnings.length));
  });

  it("is a warning of tar where a file grows", async () => {
    const directory = makeFiles("grow", 2);
    const big = openSync(join(directory, "f0"), "r+");
    ftruncateSync(big, 4 * MIB);
    closeSync(big);
    writeFileSync(join(directory, "f0"), Buffer.alloc(4 * MIB, "x"));
    const out = join(work.path, "grow.tar");
    const writing = writeArchive("tar", out, { directory, bandwidthLimit: 4 * MIB });
    for (let tries = 0; tries < 10; tries++) {
      await sleep(60);
      for (const name of ["f0", "f1"]) appendFileSync(join(directory, name), "more");
    }
    const { summary, log } = await writing;
    expect(summary.warnings).toBeGreaterThan(0);
    expect(log.join("\n")).toMatch(/warn .*file changed as we read it/);
    unpack("tar", out, `${out}.d`);
    expect(namesIn(`${out}.d`)).toEqual(["", "f0", "f1"]);
  });

  it.each(KINDS)("fails %s where a source is not there at all", async (kind) => {
    const directory = makeFiles(`missing-${kind}`, 1);
    const job = { directory, sources: ["./", "./mnt/gone"] };
    await expect(writeArchive(kind, join(work.path, `missing-${kind}.a`), job)).rejects.toThrow(/mnt\/gone/);
  });
});

describe("a full disk", () => {
  it.each([
    ["tar", "none"],
    ["tar", "zstd"],
    ["squashfs", "none"],
  ] as const)("is told as such by %s with compression %s", async (kind, compression) => {
    const directory = makeFiles(`full-${kind}-${compression}`, 6);
    const disk = join(work.path, `disk-${kind}-${compression}`);
    mkdirSync(disk);
    await run("mount", ["-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]);
    try {
      const failure = await writeArchive(kind, join(disk, "a"), { directory, compression }).catch(
        (error: unknown) => error,
      );
      expect(failure).toMatchObject({ code: "ENVIRONMENT", errno: "ENOSPC" });
    } finally {
      await run("umount", [disk]);
    }
  });
});
