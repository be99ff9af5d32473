// SPDX-License-Identifier: AGPL-3.0-or-later
// Real images, real mounts; qemu-img makes and judges them.
import { execFile } from "node:child_process";
import { mkdir, mkdtemp, open, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { HostError } from "../../../src/core/index.ts";
import { openRawView as openViewOf, type RawView, sweepRawViews } from "../../../src/device/index.ts";
import type { RawViewOptions } from "../../../src/device/view-options.ts";
import { killForCertain, processesNaming } from "../../support/programs/processes.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { openImages, openRawView } from "../../support/qcow2/open-images.ts";

const MIB = 1024 * 1024;
const SIZE = 16 * MIB;
const MECHANISMS = ["fuse-export", "nbdfuse"] as const;

const run = promisify(execFile);
const unexpected = (message: string): void => expect.unreachable(message);

let dir: string;
let runDir: string;
let images: string;

beforeEach(async (context) => {
  requireTool(context, "qemu-img", "qemu-io", "qemu-storage-daemon", "setpriv", "fusermount3");
  dir = await mkdtemp(path.join(os.tmpdir(), "raw-view-"));
  runDir = path.join(dir, "run");
  images = path.join(dir, "images");
  await mkdir(images);
});

afterEach(async () => {
  vi.unstubAllEnvs();
  expect(await processesNaming(dir)).toEqual([]);
  expect(await mountsNaming(dir)).toEqual([]);
  await rm(dir, { recursive: true, force: true });
});

async function mountsNaming(text: string): Promise<string[]> {
  return (await readFile("/proc/self/mountinfo", "utf8")).split("\n").filter((line) => line.includes(text));
}

/** What a process has worked so far, however busy the machine is. Source: proc(5), utime and stime in ticks. */
async function cpuSecondsOf(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, "latin1");
  const [userTicks, systemTicks] = stat
    .slice(stat.lastIndexOf(")") + 2)
    .split(" ")
    .slice(11, 13);
  return (Number(userTicks) + Number(systemTicks)) / 100;
}

/** An image with `writes` of [pattern, offset, length]. */
async function makeImage(name: string, writes: ReadonlyArray<[number, number, number]>, backing?: string) {
  const file = path.join(images, name);
  const base = backing === undefined ? [] : ["-b", backing, "-F", "qcow2"];
  await run("qemu-img", ["create", "-q", "-f", "qcow2", ...base, file, `${SIZE}`]);
  const options = { driver: "qcow2", file: { driver: "file", filename: file } };
  for (const [pattern, offset, length] of writes) {
    await run("qemu-io", ["-c", `write -P ${pattern} ${offset} ${length}`, `json:${JSON.stringify(options)}`]);
  }
  return file;
}

async function makeChain(): Promise<string[]> {
  const base = await makeImage("base.qcow2", [[1, 0, 4 * MIB]]);
  const middle = await makeImage("middle.qcow2", [[2, MIB, MIB]], base);
  const top = await makeImage("top.qcow2", [[3, 10 * MIB, 65536]], middle);
  await run("qemu-io", ["-f", "qcow2", "-c", "write -z 0 512k", top]);
  return [top, middle, base];
}

function openView(chain: string[], options: Partial<Omit<RawViewOptions, "chain">> = {}): Promise<RawView> {
  const signal = new AbortController().signal;
  return openRawView({ chain, sizeBytes: SIZE, runDir, name: "drive-scsi0", signal, ...options });
}

async function sameAsImage(view: string, image: string): Promise<string> {
  const { stdout } = await run("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", view, image]);
  return stdout.trim();
}

/** The bytes at `offset`, as one number if they are all the same. */
async function patternAt(file: string, offset: number): Promise<number | undefined> {
  await using handle = await open(file, "r");
  const { buffer, bytesRead } = await handle.read(Buffer.alloc(4096), 0, 4096, offset);
  return bytesRead === 4096 && buffer.every((byte) => byte === buffer[0]) ? buffer[0] : undefined;
}

describe.each(MECHANISMS)("openRawView() with %s", (mechanism) => {
  beforeEach((context) => requireTool(context, ...(mechanism === "nbdfuse" ? ["nbdfuse", "qemu-nbd"] : [])));

  it("offers a chain of three images as one raw regular file of the disk's size", async () => {
    const chain = await makeChain();
    await using view = await openView(chain, { mechanism });
    const status = await stat(view.path);
    expect(status.isFile()).toBe(true);
    expect(status.size).toBe(SIZE);
    expect(path.basename(view.path)).toBe("drive-scsi0.raw");
    expect(await sameAsImage(view.path, chain[0] ?? "")).toBe("Images are identical.");
    expect(await patternAt(view.path, MIB)).toBe(2);
    expect(await patternAt(view.path, 0)).toBe(0);
    expect(await patternAt(view.path, 3 * MIB)).toBe(1);
  });

  it("opens the given files and ignores what a header names", async () => {
    const good = await makeImage("good.qcow2", [[1, 0, SIZE]]);
    const evil = await makeImage("evil.qcow2", [[6, 0, SIZE]]);
    const top = await makeImage("top.qcow2", [[3, 0, MIB]], good);
    await run("qemu-img", ["rebase", "-q", "-u", "-f", "qcow2", "-b", evil, "-F", "qcow2", top]);
    const alone = await makeImage("alone.qcow2", [], evil);
    await using view = await openView([top, good], { mechanism });
    expect(await patternAt(view.path, 2 * MIB)).toBe(1);
    await using end = await openView([alone], { mechanism, name: "drive-scsi1" });
    expect(await patternAt(end.path, 2 * MIB)).toBe(0);
  });

  it("takes every file name as a plain name", async () => {
    const base = await makeImage("nbd:a,b=c,backing=d.qcow2", [[1, 0, MIB]]);
    const top = path.join(images, `json:{"driver" 'x'} %41.qcow2`);
    await run("cp", [await makeImage("plain.qcow2", [[2, MIB, MIB]]), top]);
    await using view = await openView([top, base], { mechanism });
    expect(await patternAt(view.path, 0)).toBe(1);
    expect(await patternAt(view.path, MIB)).toBe(2);
  });

  it("refuses writes", async () => {
    const image = await makeImage("a.qcow2", [[1, 0, MIB]]);
    await using view = await openView([image], { mechanism });
    const write = async (): Promise<void> => {
      await using handle = await open(view.path, "r+");
      await handle.write(Buffer.alloc(512, 9), 0, 512, 0);
    };
    await expect(write()).rejects.toThrow(/EACCES|EROFS|EPERM|EIO/);
    expect(await patternAt(view.path, 0)).toBe(1);
  });

  it("says what the tool said when an image cannot be opened, and leaves nothing behind", async () => {
    const noImage = path.join(images, "no-image.qcow2");
    await run("cp", ["/proc/self/status", noImage]);
    await expect(openView([noImage], { mechanism })).rejects.toThrow(/not in qcow2 format/);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("serves the files that were opened, whatever has their names by then", async () => {
    const chain = await makeChain();
    const kept = chain.map((image) => `${image}.kept`);
    await using opened = await openImages(chain);
    for (const [index, image] of chain.entries()) await rename(image, kept[index] ?? "");
    const hostFile = path.join(images, "host-file");
    await writeFile(hostFile, Buffer.alloc(SIZE, 7));
    const external = `data_file=${hostFile},data_file_raw=on`;
    for (const image of chain) await run("qemu-img", ["create", "-q", "-f", "qcow2", "-o", external, image, `${SIZE}`]);
    const signal = new AbortController().signal;
    const options = { chain: opened.files, sizeBytes: SIZE, runDir, name: "drive-scsi0", mechanism, signal };
    await using view = await openViewOf(options);
    expect(await patternAt(view.path, 2 * MIB)).toBe(1);
    expect(await patternAt(view.path, MIB)).toBe(2);
    expect(await patternAt(view.path, 10 * MIB)).toBe(3);
  });

  it("refuses an image of another size than the recorded one", async () => {
    const image = await makeImage("a.qcow2", []);
    const wrong = openView([image], { mechanism, sizeBytes: SIZE + 512 });
    await expect(wrong).rejects.toThrow(`the image holds ${SIZE} bytes, expected ${SIZE + 512}`);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("unmounts after its server was killed", async () => {
    const image = await makeImage("a.qcow2", []);
    const view = await openView([image], { mechanism });
    const pids = await processesNaming(dir);
    expect(pids).toHaveLength(mechanism === "nbdfuse" ? 2 : 1);
    for (const pid of pids) process.kill(pid, "SIGKILL");
    await view[Symbol.asyncDispose]();
    expect(await readdir(runDir)).toEqual([]);
  });

  it("tells that its server was killed, also to who knows it first", async () => {
    const image = await makeImage("a.qcow2", []);
    await using view = await openView([image], { mechanism });
    expect(await view.findTrouble()).toBeUndefined();
    const record = JSON.parse(await readFile(path.join(path.dirname(view.path), "owner.json"), "utf8"));
    killForCertain(record.children.at(-1).pid);
    expect(await view.findTrouble()).toMatch(/^(?:nbdfuse|qemu-storage-daemon) was ended by SIGKILL$/);
  });

  it("ends a server that no longer reacts", { timeout: 180_000 }, async () => {
    const image = await makeImage("a.qcow2", []);
    const view = await openView([image], { mechanism });
    for (const pid of await processesNaming(runDir)) process.kill(pid, "SIGSTOP");
    await view[Symbol.asyncDispose]();
    expect(await readdir(runDir)).toEqual([]);
  });
});

describe("openRawView()", () => {
  it("shows unused areas as holes", async () => {
    const image = await makeImage("a.qcow2", [[1, 4 * MIB, MIB]]);
    await using view = await openView([image], { mechanism: "fuse-export" });
    const { stdout } = await run("qemu-img", ["map", "--output=json", "-f", "raw", view.path]);
    const data = (JSON.parse(stdout) as Array<{ start: number; length: number; data: boolean }>)
      .filter((extent) => extent.data)
      .map(({ start, length }) => [start, length]);
    expect(data).toEqual([[4 * MIB, MIB]]);
  });

  it("chooses a mechanism by itself", async () => {
    const image = await makeImage("a.qcow2", [[1, 0, SIZE]]);
    await using view = await openView([image]);
    expect(await patternAt(view.path, SIZE - 4096)).toBe(1);
  });

  it("lets nbdfuse connect when qemu-nbd listens, not when its socket is there", async (context) => {
    requireTool(context, "nbdfuse", "qemu-nbd", "perl");
    const { stdout } = await run("which", ["qemu-nbd"]);
    await mkdir(path.join(dir, "bin"));
    const script = `#!/usr/bin/perl
      use Socket;
      my ($file) = grep { m!/nbd$! } @ARGV;
      socket(my $socket, PF_UNIX, SOCK_STREAM, 0) or die $!;
      bind($socket, pack_sockaddr_un($file)) or die $!;
      select(undef, undef, undef, 0.5);
      unlink($file);
      exec({ "${stdout.trim()}" } 'qemu-nbd', @ARGV);`;
    await writeFile(path.join(dir, "bin/qemu-nbd"), script, { mode: 0o755 });
    vi.stubEnv("PATH", `${path.join(dir, "bin")}:${process.env.PATH}`);
    await using view = await openView([await makeImage("a.qcow2", [[1, 0, MIB]])], { mechanism: "nbdfuse" });
    expect(await patternAt(view.path, 0)).toBe(1);
  });

  it("keeps views of the same device apart", async () => {
    const one = await makeImage("one.qcow2", [[1, 0, SIZE]]);
    const two = await makeImage("two.qcow2", [[2, 0, SIZE]]);
    await using first = await openView([one]);
    await using second = await openView([two]);
    expect([await patternAt(first.path, 0), await patternAt(second.path, 0)]).toEqual([1, 2]);
  });

  it("can be disposed twice", async () => {
    const view = await openView([await makeImage("a.qcow2", [])]);
    await view[Symbol.asyncDispose]();
    await view[Symbol.asyncDispose]();
    expect(await readdir(runDir)).toEqual([]);
  });

  it("keeps its folder from other users", async () => {
    await using view = await openView([await makeImage("a.qcow2", [])]);
    expect((await stat(path.dirname(view.path))).mode & 0o777).toBe(0o700);
  });

  it.each([
    ["a size that is no multiple of 512", { sizeBytes: SIZE - 100 }, /expected a multiple of 512/],
    ["a size of nothing", { sizeBytes: 0 }, /expected a multiple of 512/],
    ["a name with a slash", { name: "../drive" }, /not a device name/],
    ["a name of dots", { name: ".." }, /not a device name/],
    ["a name of 300 characters", { name: "a".repeat(300) }, /not a device name/],
    ["an empty chain", { chain: [] }, /no image is given/],
    ["a chain beyond the limit", { chain: Array(2001).fill("a.qcow2") }, /at most 2000/],
  ])("refuses %s", async (_, options, message) => {
    const image = await makeImage("a.qcow2", []);
    const { chain = [image], ...others } = options as { chain?: string[] };
    const attempt = openView(
      chain.map(() => image),
      others,
    );
    await expect(attempt).rejects.toThrow(message);
    await expect(attempt).rejects.toMatchObject({ code: "INVALID_PARAMS" });
  });

  it("stops waiting with the abort reason and leaves nothing behind", async () => {
    const bin = path.join(images, "bin");
    await mkdir(bin);
    await writeFile(path.join(bin, "qemu-storage-daemon"), "#!/bin/sh\nexec sleep 60", { mode: 0o755 });
    vi.stubEnv("PATH", `${bin}:${process.env.PATH}`);
    const image = await makeImage("a.qcow2", []);
    const aborter = new AbortController();
    const reason = new Error("the job was cancelled");
    setTimeout(() => aborter.abort(reason), 200);
    await expect(openView([image], { signal: aborter.signal, mechanism: "fuse-export" })).rejects.toBe(reason);
    expect(await readdir(runDir)).toEqual([]);
  });

  it("says which folder cannot be written", async () => {
    const image = await makeImage("a.qcow2", []);
    const attempt = openView([image], { runDir: path.join(image, "run") });
    await expect(attempt).rejects.toThrow(/a\.qcow2\/run": .*ENOTDIR/);
    await expect(attempt).rejects.toBeInstanceOf(HostError);
  });

  it("opens a chain of 300 images without delay where the headers name their backing files", async () => {
    // One image by qemu-img; the others are copies with another number in the header's backing name.
    const folderName = (index: number) => `qemu-${`${index}`.padStart(3, "0")}`;
    const template = path.join(images, "template.qcow2");
    const options = ["-u", "-b", "../qemu-NNN/drive-scsi0.qcow2", "-F", "qcow2"];
    await run("qemu-img", ["create", "-q", "-f", "qcow2", ...options, template, `${SIZE}`]);
    const bytes = await readFile(template);
    const numberAt = bytes.indexOf("qemu-NNN");
    const chain: string[] = [];
    for (let index = 0; index < 300; index++) {
      const file = path.join(images, folderName(index), "drive-scsi0.qcow2");
      await mkdir(path.dirname(file));
      if (index > 0) bytes.write(folderName(index - 1), numberAt, "latin1");
      if (index > 0) await writeFile(file, bytes);
      else await run("qemu-img", ["create", "-q", "-f", "qcow2", file, `${SIZE}`]);
      chain.unshift(file);
    }
    await run("qemu-io", ["-f", "qcow2", "-c", `write -P 7 0 ${MIB}`, chain.at(-1) ?? ""]);
    await using view = await openView(chain, { mechanism: "fuse-export" });
    const [server, ...others] = await processesNaming(runDir);
    expect(others).toEqual([]);
    expect(await cpuSecondsOf(server ?? 0)).toBeLessThan(3); // a fraction of one; 7 where they do not
    expect([await patternAt(view.path, 0), await patternAt(view.path, 2 * MIB)]).toEqual([7, 0]);
  });

  it("follows the given path where a folder of it is a symbolic link", async () => {
    const base = await makeImage("base.qcow2", [[1, 0, MIB]]);
    await mkdir(path.join(dir, "elsewhere", "deep"), { recursive: true });
    await run("ln", ["-s", path.join(dir, "elsewhere", "deep"), path.join(dir, "link")]);
    await run("cp", [await makeImage("top.qcow2", [[2, MIB, MIB]]), path.join(dir, "link", "top.qcow2")]);
    await using view = await openView([path.join(dir, "link", "top.qcow2"), base]);
    expect([await patternAt(view.path, 0), await patternAt(view.path, MIB)]).toEqual([1, 2]);
  });
});

describe("sweepRawViews()", () => {
  it("leaves a view of a living process alone", async () => {
    const image = await makeImage("a.qcow2", [[1, 0, SIZE]]);
    await using view = await openView([image]);
    await sweepRawViews(runDir, unexpected);
    expect(await patternAt(view.path, 0)).toBe(1);
  });

  it("has nothing to do where there is no folder", async () => {
    await expect(sweepRawViews(path.join(dir, "none"), unexpected)).resolves.toBeUndefined();
  });
});
