// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import {
  chmod,
  link,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CleanupStack } from "../../../src/core/index.ts";
import { mountSquashfs, sweepRawViews } from "../../../src/device/index.ts";
import { openLoopDevice } from "../../../src/device/loop-device.ts";
import { listMounts, mountsBelow } from "../../../src/device/mounts.ts";
import { openRegularFile, type RegularFile, readProcess } from "../../../src/host/index.ts";
import { killForCertain, processesNaming } from "../../support/programs/processes.ts";
import { requireTool } from "../../support/programs/tools.ts";

const run = promisify(execFile);
const unexpected = (message: string): void => expect.unreachable(message);
const PATH = process.env.PATH;
const never = new AbortController().signal;
let dir: string;
let imagePath: string;
let image: RegularFile;
let runDir: string;

beforeEach(async (context) => {
  requireTool(context, "mksquashfs", "squashfuse_ll", "fusermount3", "setpriv");
  dir = await mkdtemp(path.join(os.tmpdir(), "squashfs-view-"));
  imagePath = path.join(dir, "a.sqfs");
  runDir = path.join(dir, "run");
  await mkdir(path.join(dir, "tree"));
  await writeFile(path.join(dir, "tree/file"), "content");
  await link(path.join(dir, "tree/file"), path.join(dir, "tree/second name"));
  await run("chown", ["1000:1001", path.join(dir, "tree/file")]);
  await run("chmod", ["4755", path.join(dir, "tree/file")]);
  await run("mksquashfs", [path.join(dir, "tree"), imagePath, "-no-progress"]);
  await chmod(imagePath, 0o600);
  image = await openRegularFile(imagePath);
});

afterEach(async () => {
  process.env.PATH = PATH;
  await image[Symbol.asyncDispose]();
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
    await pretendVersion("0.1.104");
    await writeFile(imagePath, "no image");
    const attempt = mountSquashfs({ image, runDir, signal: never });
    await expect(attempt).rejects.toThrow(/: squashfuse_ll ended .*; the kernel said: /);
    await expect(attempt).rejects.toMatchObject({ hint: expect.stringContaining("install the package squashfuse") });
    await expect(mountSquashfs({ image, runDir, mechanism: "kernel", signal: never })).rejects.toThrow(/^Cannot mount/);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("refuses a cancelled request", async () => {
    await expect(mountSquashfs({ image, runDir, signal: AbortSignal.abort(new Error("no")) })).rejects.toThrow("no");
  });
});

/** Another image takes the name of the one that is open. */
async function swapImage(): Promise<void> {
  await mkdir(path.join(dir, "other"));
  await writeFile(path.join(dir, "other/file"), "somebody else's");
  await run("mksquashfs", [path.join(dir, "other"), `${imagePath}.new`, "-no-progress"]);
  await rename(`${imagePath}.new`, imagePath);
}

describe("mountSquashfs() of a file whose name leads elsewhere by now", () => {
  it.each(["kernel", "squashfuse"] as const)("shows the open file, by %s", async (mechanism) => {
    await swapImage();
    await using view = await mountSquashfs({ image, runDir, mechanism, signal: never });
    expect(await readFile(path.join(view.path, "file"), "utf8")).toBe("content");
  });

  it("shows a file that has no name any more, and frees its loop device", async () => {
    const { ino } = await stat(imagePath);
    await rm(imagePath);
    const loops = async (): Promise<string[]> => {
      const { stdout } = await run("losetup", ["--list", "--noheadings", "--output", "BACK-INO,RO"]);
      return stdout.split("\n").map((line) => line.trim().replace(/\s+/g, " "));
    };
    {
      await using view = await mountSquashfs({ image, runDir, mechanism: "kernel", signal: never });
      expect(await readFile(path.join(view.path, "file"), "utf8")).toBe("content");
      expect(await loops()).toContain(`${ino} 1`); // read-only
    }
    expect(await loops()).not.toContain(`${ino} 1`);
  });
});

describe("openLoopDevice()", () => {
  it("gives each of many files a device, and frees it without a mount", async () => {
    await using stack = new CleanupStack();
    const devices = await Promise.all(Array.from({ length: 12 }, () => openLoopDevice(image)));
    for (const device of devices) stack.use(device);
    expect(new Set(devices.map((device) => device.path)).size).toBe(12);
    const named = async (): Promise<string> => (await run("losetup", ["-j", imagePath])).stdout;
    expect(await named()).toContain(devices[0]?.path ?? "none");
    await stack[Symbol.asyncDispose]();
    expect(await named()).toBe("");
  });
});

/** A squashfuse_ll that says it is another version. */
async function pretendVersion(version: string): Promise<void> {
  const { stdout } = await run("which", ["squashfuse_ll"], { env: { PATH } });
  const script = `#!/bin/sh\n[ "$1" = -V ] && { echo "squashfuse ${version} (c) 2012" >&2; exit 254; }\nexec ${stdout.trim()} "$@"\n`;
  await mkdir(path.join(dir, "bin"), { recursive: true });
  await writeFile(path.join(dir, "bin/squashfuse_ll"), script, { mode: 0o755 });
  process.env.PATH = `${dir}/bin:${PATH}`;
}

describe("mountSquashfs() by squashfuse", () => {
  it("is the way where it loses no attributes", async () => {
    for (const [version, type] of [
      ["0.1.104", "squashfs"],
      ["0.2.0", "fuse.squashfuse_ll"],
      ["0.5.2", "fuse.squashfuse_ll"],
      ["1.0", "fuse.squashfuse_ll"],
    ] as const) {
      await pretendVersion(version);
      await using view = await mountSquashfs({ image, runDir, signal: never });
      expect((await listMounts()).find(({ point }) => point === view.path)?.type, version).toBe(type);
      expect(view.fallbackReason).toBeUndefined();
    }
  });

  it("gives no image to the kernel that it cannot read itself", async () => {
    await pretendVersion("0.5.2");
    await writeFile(imagePath, "no image");
    const attempt = mountSquashfs({ image, runDir, signal: never });
    await expect(attempt).rejects.toThrow(/^Cannot mount "[^"]+": squashfuse_ll ended with status \d+[^;]*$/);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("leaves it to the kernel where there is no squashfuse_ll", async () => {
    await mkdir(path.join(dir, "bin"));
    process.env.PATH = `${dir}/bin`;
    for (const tool of ["mount", "umount", "losetup"]) {
      const { stdout } = await run("which", [tool], { env: { PATH } });
      await symlink(stdout.trim(), path.join(dir, "bin", tool));
    }
    await using view = await mountSquashfs({ image, runDir, signal: never });
    expect((await listMounts()).find(({ point }) => point === view.path)?.type).toBe("squashfs");
  });

  it("gives the server the open image, the open device, and no right but to read", async () => {
    await using view = await mountSquashfs({ image, runDir, mechanism: "squashfuse", signal: never });
    const record = JSON.parse(await readFile(path.join(path.dirname(view.path), "owner.json"), "utf8"));
    const { pid } = record.children[0];
    const status = await readFile(`/proc/${pid}/status`, "utf8");
    expect(status).toMatch(/^Uid:\t65534\t65534\t65534\t65534$/m);
    expect(status).toMatch(/^Groups:\t *$/m);
    for (const set of ["Prm", "Eff", "Bnd", "Amb"]) expect(status).toContain(`\nCap${set}:\t0000000000000004\n`);
    expect(status).toContain("\nNoNewPrivs:\t1\n");
    expect(await readlink(`/proc/${pid}/fd/3`)).toBe(imagePath);
    expect(await readlink(`/proc/${pid}/fd/4`)).toBe("/dev/fuse");
    expect(await readFile(`/proc/${pid}/fdinfo/3`, "utf8")).toMatch(/^flags:\t0[0-7]*0$/m); // O_RDONLY
    expect(await readdir("/proc/self/fd").then((fds) => Promise.all(fds.map(targetOf)))).not.toContain("/dev/fuse");
  });
});

const targetOf = (fd: string): Promise<string> => readlink(`/proc/self/fd/${fd}`).catch(() => "");

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
