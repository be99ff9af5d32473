// SPDX-License-Identifier: AGPL-3.0-or-later
// The command line on a store with real backups in it.
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { constants } from "node:fs";
import { chmod, cp, mkdir, open, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { type Bundle, buildProgram } from "../support/programs/bundle.ts";
import { backUp } from "../support/vm/vm-job.ts";

const MIB = 2 ** 20;
const run = promisify(execFile);
let program: Bundle;
let node: TestNode;
let full: string;
let incremental: string;

/** Runs the program; never rejects. */
async function cli(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  try {
    return { code: 0, ...(await run(process.execPath, [program.path, ...args])) };
  } catch (error) {
    const { code, stdout, stderr } = error as { code: number; stdout: string; stderr: string };
    return { code, stdout, stderr };
  }
}

beforeAll(async () => {
  program = await buildProgram("src/cli/main.ts");
  node = await TestNode.create();
  await using guest = await LabGuest.start({
    dir: path.join(node.dir, "vm"),
    root: node.root,
    vmid: 100,
    storeid: node.storeid,
    disks: [{ device: "drive-scsi0", sizeBytes: 16 * MIB }],
  });
  await guest.write("drive-scsi0", 0, seededBytes(1, 2 * MIB));
  full = ((await backUp(node, guest, { epoch: 1_700_000_000 })).volname ?? "").replace("backup/", "");
  await guest.write("drive-scsi0", 8 * MIB, seededBytes(2, MIB));
  incremental = ((await backUp(node, guest, { epoch: 1_700_000_100 })).volname ?? "").replace("backup/", "");
});

afterAll(async () => {
  await program[Symbol.asyncDispose]();
  await node[Symbol.asyncDispose]();
});

describe("pve-backup-host list", () => {
  it("prints one line per backup, with kind and base", async () => {
    const { stdout, code } = await cli("list", node.storePath);
    expect(code).toBe(0);
    const lines = stdout.trim().split("\n");
    expect(lines).toHaveLength(3);
    expect(lines[1]).toMatch(/^100\/qemu-1700000000 +2023-11-14T22:13:20Z +2\.\d MiB +full +-$/);
    expect(lines[2]).toMatch(
      /^100\/qemu-1700000100 +2023-11-14T22:15:00Z +[\d.]+ MiB +incremental +100\/qemu-1700000000$/,
    );
  });

  it("prints nothing of the notes that a terminal would obey", async () => {
    const attributes = path.join(node.storePath, full, "attributes.json");
    const notes = "a\u001b[31mb\rc\u009b2Jd\ne";
    await writeFile(attributes, JSON.stringify({ format: "pve-backup-host-attributes", version: 1, notes }));
    const { stdout } = await cli("list", node.storePath);
    await rm(attributes);
    expect(stdout.split("\n")[1]).toMatch(/- +a \[31mb c 2Jd$/);
  });

  it("prints JSON that a script can read, of one guest", async () => {
    const points = JSON.parse((await cli("list", node.storePath, "--vmid", "100", "--json")).stdout) as unknown[];
    expect(points).toMatchObject([{ archive: full }, { archive: incremental, parent: `backup/${full}` }]);
    expect((await cli("list", node.storePath, "--vmid", "101", "--json")).stdout).toBe("[]\n");
  });

  it("ends with 5 and one sentence where the store is missing, with 2 for a wrong command line", async () => {
    const missing = await cli("list", "/nowhere");
    expect(missing).toMatchObject({ code: 5, stdout: "" });
    expect(missing.stderr).toMatch(/^error: Cannot use storage path "\/nowhere": no such file or directory.*\n$/);
    expect((await cli("list", node.storePath, "--vmid", "7")).code).toBe(2);
    expect((await cli("nonsense")).code).toBe(2);
    expect((await cli("list", "--help")).stdout).toContain("--vmid <id>");
    expect((await cli("--help")).stdout).toContain("Exit status: 0 success, 1 failed,");
  });

  it("shows that a base is missing, in the table and in JSON, and check says so", async () => {
    await rename(path.join(node.storePath, full), path.join(node.dir, "away"));
    const table = await cli("list", node.storePath);
    const json = await cli("list", node.storePath, "--json");
    const checked = await cli("check", node.storePath, incremental);
    await rename(path.join(node.dir, "away"), path.join(node.storePath, full));
    expect(table.stdout.split("\n")[1]).toMatch(/ incremental +100\/qemu-1700000000 \(missing\)$/);
    expect(JSON.parse(json.stdout)).toMatchObject([{ archive: incremental, baseMissing: true }]);
    expect(checked.code).toBe(3);
    expect(checked.stderr).toMatch(
      /^error: Cannot use "backup\/100\/qemu-1700000100": its base .*qemu-1700000000.* missing/,
    );
    expect(JSON.parse((await cli("list", node.storePath, "--json")).stdout)).toMatchObject([
      { baseMissing: false },
      { baseMissing: false },
    ]);
  });

  it("lists the rest and ends with 5 where a backup is damaged, newer, or not to be read", async () => {
    const copy = path.join(node.storePath, "100/qemu-1600000001");
    await cp(path.join(node.storePath, full), copy, { recursive: true });
    const manifest = path.join(copy, "manifest.json");
    const newer = (await readFile(manifest, "utf8")).replace('"version": 1,', '"version": 99,');
    for (const [text, code] of [
      ["{", 3],
      [newer, 5],
    ] as const) {
      await writeFile(manifest, text);
      const listed = await cli("list", node.storePath);
      expect(listed).toMatchObject({ code: 5, stderr: expect.stringMatching(/^warning: .*qemu-1600000001.*\n$/) });
      expect(listed.stdout.trim().split("\n")).toHaveLength(3);
      expect((await cli("check", node.storePath, "100/qemu-1600000001")).code).toBe(code);
    }
    await rm(copy, { recursive: true });
  });

  it("ends with 5 for another user, who may not read the backups", async (context) => {
    if (process.getuid?.() !== 0) return context.skip("needs root");
    const asNobody = (...args: string[]): Promise<{ code: number }> =>
      run("setpriv", [
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        process.execPath,
        program.path,
        ...args,
      ])
        .then(() => ({ code: 0 }))
        .catch(({ code }: { code: number }) => ({ code }));
    const guest = path.join(node.storePath, "100");
    for (const folder of [node.dir, node.storePath, guest]) await chmod(folder, 0o755);
    expect(await asNobody("list", node.storePath)).toEqual({ code: 5 });
    expect(await asNobody("check", node.storePath, full)).toEqual({ code: 5 });
    await chmod(guest, 0o700);
    expect(await asNobody("check", node.storePath, full)).toEqual({ code: 5 });
  });
});

describe("pve-backup-host check", () => {
  it("checks the whole chain of a backup", async () => {
    const { code, stdout } = await cli("check", node.storePath, incremental);
    expect(code).toBe(0);
    expect(stdout).toContain("drive-scsi0: 16.0 MiB, 2 images");
    expect(stdout.match(/checksum matches, tables are sound/g)).toHaveLength(2);
    expect(stdout).toContain(`${incremental} can be restored`);
  });

  it("takes every form of a name that was printed somewhere", async () => {
    const folder = path.join(node.storePath, full);
    for (const name of [`backup/${full}`, `${node.storeid}:backup/${full}`, folder, `${folder}/`]) {
      const { code, stdout } = await cli("check", node.storePath, name);
      expect({ code, last: stdout.trim().split("\n").at(-1) }).toEqual({ code: 0, last: `${full} can be restored` });
    }
    expect((await cli("check", node.storePath, "/etc")).code).toBe(2);
  });

  it("ends with 4 for a backup that does not exist", async () => {
    expect((await cli("check", node.storePath, "100/qemu-1")).code).toBe(4);
  });

  it("finds one changed byte of data in the base, and ends with 3", async () => {
    const file = path.join(node.storePath, full, "drive-scsi0.qcow2");
    await using handle = await open(file, "r+");
    const byte = Buffer.alloc(1);
    await handle.read(byte, 0, 1, 300_000);
    await handle.write(Buffer.from([(byte[0] ?? 0) ^ 1]), 0, 1, 300_000);
    const { code, stderr } = await cli("check", node.storePath, incremental);
    expect(code).toBe(3);
    expect(stderr).toContain(`${full}/drive-scsi0.qcow2": checksum mismatch (xxh3-128)`);
    await handle.write(byte, 0, 1, 300_000);
    expect((await cli("check", node.storePath, incremental)).code).toBe(0);
  });

  it("finds lost tables in a folder of the upstream example, of which no digest is recorded", async () => {
    const archive = "100/qemu-1600000000";
    const folder = path.join(node.storePath, archive);
    await mkdir(folder);
    await writeFile(path.join(folder, "guest.conf"), "#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n");
    const file = path.join(folder, "drive-scsi0.qcow2");
    await run("qemu-img", ["create", "-q", "-f", "qcow2", file, "16M"]);
    await run("qemu-io", ["-f", "qcow2", "-c", "write -P 7 0 1M", file]);
    expect((await cli("check", node.storePath, archive)).code).toBe(0);
    const l1Offset = Number((await readFile(file)).readBigUInt64BE(40));
    await using handle = await open(file, "r+");
    await handle.write(Buffer.alloc(8), 0, 8, l1Offset);
    const { code, stderr } = await cli("check", node.storePath, archive);
    expect(code).toBe(3);
    expect(stderr).toMatch(/tables of ".*\/drive-scsi0\.qcow2" are damaged: 17 clusters belong to no table/);
    await rm(folder, { recursive: true });
  });
});

describe("pve-backup-host, when its output goes wrong", () => {
  /** Runs a line of bash in which "$@" is the program with its arguments; the status is that of the program. */
  async function bash(line: string, ...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
    const command = ["-c", `set -o pipefail; ${line}`, "bash", process.execPath, program.path, ...args];
    return await run("bash", command)
      .then((output) => ({ code: 0, ...output }))
      .catch(({ code, stdout, stderr }) => ({ code, stdout, stderr }));
  }

  const locks = async (): Promise<string[]> => await readdir(path.join(node.storePath, "100/.locks"));
  const VERBS = [
    ["list", () => ["list", node.storePath]],
    ["list --json", () => ["list", node.storePath, "--json"]],
    ["check", () => ["check", node.storePath, incremental]],
    ["--help", () => ["--help"]],
  ] as const;

  it.each(VERBS)("%s ends quietly with 141 when its reader has gone", async (_name, args) => {
    const line = '{ sleep 0.3; "$@"; } | true'; // when the program starts there is no reader any more
    expect(await bash(line, ...args())).toEqual({ code: 141, stdout: "", stderr: "" });
    expect(await locks()).toEqual([]);
  });

  it.each(VERBS)("%s ends with 1 and one sentence when the disk is full", async (_name, args) => {
    const stderr = "error: Cannot write to standard output: no space left on the device (ENOSPC)\n";
    expect(await bash('"$@" > /dev/full', ...args())).toEqual({ code: 1, stdout: "", stderr });
    expect(await locks()).toEqual([]);
  });

  it.each(VERBS)("%s works without standard input, output and error", async (_name, args) => {
    expect(await bash('"$@" <&- >&-', ...args())).toEqual({ code: 0, stdout: "", stderr: "" });
    expect(await bash('"$@" <&- >&- 2>&-', ...args())).toEqual({ code: 0, stdout: "", stderr: "" });
    expect(await locks()).toEqual([]);
  });

  it("keeps its status when nobody can be told the reason", async () => {
    for (const line of ['"$@" 2> /dev/full', '"$@" 2>&-', '{ sleep 0.3; "$@"; } 2>&1 > /dev/null | true']) {
      expect(await bash(line, "check", node.storePath, "100/qemu-1")).toMatchObject({ code: 4, stderr: "" });
      expect(await bash(line, "list", "/nowhere")).toMatchObject({ code: 5, stderr: "" });
      expect(await bash(line, "nonsense")).toMatchObject({ code: 2, stderr: "" });
    }
  });

  it("releases its locks on SIGTERM, though its reader does not read", async () => {
    const fifo = path.join(node.dir, "fifo");
    await run("mkfifo", [fifo]);
    await using reader = await open(fifo, constants.O_RDWR | constants.O_NONBLOCK);
    await using writer = await open(fifo, constants.O_WRONLY);
    for (let isFull = false; !isFull; ) isFull = (await reader.write(Buffer.alloc(4096)).catch(() => null)) === null;
    const child = spawn(process.execPath, [program.path, "check", node.storePath, incremental], {
      stdio: ["ignore", writer.fd, "pipe"],
    });
    const ended = once(child, "exit");
    await expect.poll(async () => (await locks()).length).toBeGreaterThan(0);
    child.kill("SIGTERM");
    await expect.poll(locks).toEqual([]);
    await reader.read(Buffer.alloc(2 ** 20));
    expect(await ended).toEqual([130, null]);
  });
});
