// SPDX-License-Identifier: AGPL-3.0-or-later
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { isRunning, readProcess } from "../../../src/host/index.ts";
import { parseVmgenid, readGuestIdentity } from "../../../src/pve/index.ts";
import { createLab, VMGENID } from "../store/lab.ts";

const OTHER = "99999999-2222-3333-4444-555555555555";

describe("parseVmgenid()", () => {
  it.each<[string, string, string | undefined]>([
    ["the line", `memory: 1\nvmgenid: ${VMGENID}\n`, VMGENID],
    ["upper case", "vmgenid: ABCDEF00-2222-3333-4444-555555555555\n", "abcdef00-2222-3333-4444-555555555555"],
    ["no final newline, and CRLF", `vmgenid: ${VMGENID}\r`, VMGENID],
    ["a snapshot's own", `memory: 1\n[before]\nvmgenid: ${VMGENID}\n`, undefined],
    ["the top one of several", `vmgenid: ${VMGENID}\n[before]\nvmgenid: ${OTHER}\n`, VMGENID],
    ["0, switched off", "vmgenid: 0\n", undefined],
    ["1, to be made", "vmgenid: 1\n", undefined],
    ["the zero UUID", "vmgenid: 00000000-0000-0000-0000-000000000000\n", undefined],
    ["a comment", `#vmgenid: ${VMGENID}\n`, undefined],
    ["a longer key", `xvmgenid: ${VMGENID}\n`, undefined],
    ["nothing", "", undefined],
  ])("reads %s", (_what, text, expected) => {
    expect(parseVmgenid(Buffer.from(text, "latin1"))).toBe(expected);
  });
});

describe("readGuestIdentity()", () => {
  it("reads the config and the process of PVE's pid file below the root", async () => {
    await using lab = await createLab();
    await mkdir(join(lab.root, "etc/pve/qemu-server"), { recursive: true });
    await mkdir(join(lab.root, "run/qemu-server"), { recursive: true });
    expect(await readGuestIdentity(100, lab.root)).toEqual({});
    await writeFile(join(lab.root, "etc/pve/qemu-server/100.conf"), `vmgenid: ${VMGENID}\n`);
    await writeFile(join(lab.root, "run/qemu-server/100.pid"), `${process.pid}\n`);
    const stat = await readFile(`/proc/${process.pid}/stat`, "latin1");
    expect(await readGuestIdentity(100, lab.root)).toEqual({
      vmgenid: VMGENID,
      process: {
        bootId: (await readFile("/proc/sys/kernel/random/boot_id", "latin1")).trim(),
        pid: process.pid,
        startTime: stat.slice(stat.lastIndexOf(")")).split(" ")[20],
      },
    });
    await writeFile(join(lab.root, "run/qemu-server/100.pid"), "no number");
    expect((await readGuestIdentity(100, lab.root)).process).toBeUndefined();
  });
});

describe("readProcess()", () => {
  it("is not misled by a command name with parentheses and spaces", async () => {
    const program = 'process.title = "a) R 1 2 (b"; process.stdout.write("x"); setTimeout(() => {}, 60_000)';
    const child = spawn(process.execPath, ["-e", program], {
      stdio: ["ignore", "pipe", "ignore"],
    });
    await once(child.stdout, "data");
    expect(await readFile(`/proc/${child.pid}/comm`, "latin1")).toBe("a) R 1 2 (b\n");
    const found = await readProcess(child.pid ?? 0);
    expect(Number(found?.startTime)).toBeGreaterThan(1000);
    if (found === undefined) throw new Error("not found");
    expect(await isRunning(found)).toBe(true);
    const ended = once(child, "exit");
    child.kill("SIGKILL");
    await ended;
    expect(await isRunning(found)).toBe(false);
  });
});
