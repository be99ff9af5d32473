// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { link, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { mountSquashfs, sweepRawViews } from "../../../src/device/index.ts";
import { mountsBelow } from "../../../src/device/mounts.ts";
import { readProcess } from "../../../src/host/index.ts";
import { killForCertain, processesNaming } from "../../support/processes.ts";
import { requireTool } from "../../support/tools.ts";

const run = promisify(execFile);
const unexpected = (message: string): void => expect.unreachable(message);
const never = new AbortController().signal;
let dir: string;
let image: string;
let runDir: string;

beforeEach(async (context) => {
  requireTool(context, "mksquashfs", "squashfuse_ll", "fusermount3", "setpriv");
  dir = await mkdtemp(path.join(os.tmpdir(), "squashfs-view-"));
  image = path.join(dir, "a.sqfs");
  runDir = path.join(dir, "run");
  await mkdir(path.join(dir, "tree"));
  await writeFile(path.join(dir, "tree/file"), "content");
  await link(path.join(dir, "tree/file"), path.join(dir, "tree/second name"));
  await run("chown", ["1000:1001", path.join(dir, "tree/file")]);
  await run("chmod", ["4755", path.join(dir, "tree/file")]);
  await run("mksquashfs", [path.join(dir, "tree"), image, "-no-progress"]);
});

afterEach(async () => {
  expect(await mountsBelow(dir)).toEqual([]);
  expect(await processesNaming(dir)).toEqual([]);
  await rm(dir, { recursive: true, force: true });
});

/** Mount options of a mount point, as the kernel has them. */
async function optionsOf(point: string): Promise<string[]> {
  const line = (await readFile("/proc/self/mountinfo", "utf8")).split("\n").find((one) => one.split(" ")[4] === point);
  return line?.split(" ")[5]?.split(",") ?? [];
}

describe("mountSquashfs()", () => {
  it.each(["kernel", "squashfuse"] as const)("shows the files with their owners, read-only (%s)", async (mechanism) => {
    const view = await mountSquashfs({ image, runDir, mechanism, signal: never });
    const found = await stat(path.join(view.path, "file"));
    expect([found.uid, found.gid, found.mode & 0o7777]).toEqual([1000, 1001, 0o4755]);
    const second = await stat(path.join(view.path, "second name"));
    expect([second.ino, second.nlink]).toEqual([found.ino, 2]);
    expect(await readFile(path.join(view.path, "file"), "utf8")).toBe("content");
    expect(await optionsOf(view.path)).toEqual(expect.arrayContaining(["ro", "nosuid", "nodev"]));
    await view[Symbol.asyncDispose]();
    await view[Symbol.asyncDispose]();
    expect(await readdir(runDir)).toEqual([]);
  });

  it("tells when it serves no longer", async () => {
    for (const mechanism of ["kernel", "squashfuse"] as const) {
      await using view = await mountSquashfs({ image, runDir, mechanism, signal: never });
      expect(await view.findTrouble()).toBeUndefined();
      await run("umount", [view.path]);
      expect(await view.findTrouble()).toMatch(/^it was unmounted$|^squashfuse_ll ended with status 0$/);
    }
    await using view = await mountSquashfs({ image, runDir, mechanism: "squashfuse", signal: never });
    const record = JSON.parse(await readFile(path.join(path.dirname(view.path), "owner.json"), "utf8"));
    killForCertain(record.children[0].pid);
    expect(await view.findTrouble()).toBe("squashfuse_ll was ended by SIGKILL");
  });

  it("gives each mount of one image a place of its own", async () => {
    await using one = await mountSquashfs({ image, runDir, signal: never });
    await using two = await mountSquashfs({ image, runDir, signal: never });
    expect(one.path).not.toBe(two.path);
    await one[Symbol.asyncDispose]();
    expect(await readFile(path.join(two.path, "file"), "utf8")).toBe("content");
  });

  it("says what both ways say about a file that is no image, and leaves nothing", async () => {
    await writeFile(image, "no image");
    const attempt = mountSquashfs({ image, runDir, signal: never });
    await expect(attempt).rejects.toThrow(/: squashfuse_ll ended .*; the kernel said: /);
    await expect(attempt).rejects.toMatchObject({ hint: expect.stringContaining("install the package squashfuse") });
    await expect(mountSquashfs({ image, runDir, mechanism: "kernel", signal: never })).rejects.toThrow(/^Cannot mount/);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("refuses a relative path, and a cancelled request", async () => {
    await expect(mountSquashfs({ image: "a.sqfs", runDir, signal: never })).rejects.toThrow(
      "an absolute path is wanted",
    );
    await expect(mountSquashfs({ image, runDir, signal: AbortSignal.abort(new Error("no")) })).rejects.toThrow("no");
  });
});

describe("sweepRawViews() and squashfs", () => {
  it("unmounts what a killed process left, and leaves a living one's alone", async () => {
    const view = await mountSquashfs({ image, runDir, mechanism: "kernel", signal: never });
    await sweepRawViews(runDir, unexpected);
    expect(await mountsBelow(view.path)).toEqual([view.path]);
    // As if its owner had been another process, which was killed.
    const other = spawn("sleep", ["60"]);
    await once(other, "spawn");
    const owner = await readProcess(other.pid ?? 0);
    await writeFile(path.join(path.dirname(view.path), "owner.json"), JSON.stringify({ owner, children: [] }));
    other.kill("SIGKILL");
    await once(other, "exit");
    await sweepRawViews(runDir, unexpected);
    expect(await readdir(runDir)).toEqual([]);
  });
});
