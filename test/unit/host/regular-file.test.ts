// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import {
  appendFileSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  renameSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  FileProblem,
  formatStamp,
  openRegularFile,
  readInto,
  readRegularFile,
  readStampAgain,
} from "../../../src/host/index.ts";

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "pbh-host-"));
});
afterEach(() => rmSync(dir, { recursive: true }));

describe("openRegularFile()", () => {
  it("refuses what is not a regular file, without waiting for it", async () => {
    const at = (name: string): string => join(dir, name);
    execFileSync("mkfifo", [at("fifo")]);
    await using listener = net.createServer().listen(at("socket"));
    await once(listener, "listening");
    symlinkSync("/dev/zero", at("link"));
    mkdirSync(at("folder"));
    await expect(openRegularFile(at("fifo"))).rejects.toThrow(/^it is a named pipe, not a file$/);
    await expect(openRegularFile(at("socket"))).rejects.toThrow(/^it is a socket, not a file$/);
    await expect(openRegularFile("/dev/zero")).rejects.toThrow(/^it is a device, not a file$/);
    await expect(openRegularFile(at("folder"))).rejects.toThrow(/^it is a directory, not a file$/);
    await expect(openRegularFile(at("link"))).rejects.toThrow(/^it is a symbolic link, not a file$/);
    await expect(openRegularFile(at("none"))).rejects.toMatchObject({ code: "ENOENT" });
  });

  it("reads what was opened, whatever has its name by then", async () => {
    writeFileSync(join(dir, "a"), "first");
    await using file = await openRegularFile(join(dir, "a"));
    renameSync(join(dir, "a"), join(dir, "b"));
    writeFileSync(join(dir, "a"), "another");
    expect((await file.handle.readFile()).toString()).toBe("first");
  });
});

describe("readRegularFile()", () => {
  it("refuses a file that is larger than it may be", async () => {
    writeFileSync(join(dir, "a"), "12345");
    expect((await readRegularFile(join(dir, "a"), 5)).toString()).toBe("12345");
    await expect(readRegularFile(join(dir, "a"), 4)).rejects.toThrow(FileProblem);
  });
});

describe("readStampAgain()", () => {
  it("tells every change of a file, also of one whose times were put back", async () => {
    const path = join(dir, "a");
    writeFileSync(path, "1234");
    await using file = await openRegularFile(path);
    const stamps = [formatStamp(await readStampAgain(file.handle))];
    expect(formatStamp(await readStampAgain(file.handle))).toBe(stamps[0]);
    const changes = [
      () => appendFileSync(path, "5"),
      () => writeFileSync(path, "54321"), // in place
      () => utimesSync(path, 1, 1),
      () => linkSync(path, join(dir, "b")),
    ];
    for (const change of changes) {
      execFileSync("sleep", ["0.02"]); // a kernel's clock ticks every few milliseconds
      change();
      stamps.push(formatStamp(await readStampAgain(file.handle)));
    }
    expect(new Set(stamps).size).toBe(stamps.length);
  });
});

describe("readInto()", () => {
  it("fills the target where the kernel gives less at once, and ends at the end of the file", async () => {
    writeFileSync(join(dir, "a"), "0123456789");
    await using file = await openRegularFile(join(dir, "a"));
    const { handle } = file;
    const read = handle.read.bind(handle) as (...args: unknown[]) => Promise<unknown>;
    const short = (target: Buffer, at: number, length: number, position: number): Promise<unknown> =>
      read(target, at, Math.min(3, length), position);
    Object.assign(handle, { read: short });
    const target = Buffer.alloc(8, "-");
    expect(await readInto(handle, target, 1)).toBe(8);
    expect(target.toString()).toBe("12345678");
    target.fill("-");
    expect(await readInto(handle, target, 5)).toBe(5);
    expect(target.toString()).toBe("56789---");
    expect(await readInto(handle, target, 10)).toBe(0);
  });
});
