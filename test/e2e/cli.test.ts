// SPDX-License-Identifier: AGPL-3.0-or-later
// The command line on a store with real backups in it.
import { execFile } from "node:child_process";
import { mkdir, open, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { type Bundle, buildProgram } from "../support/programs/bundle.ts";
import { backUp, TestNode } from "../support/vm/vm-job.ts";

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
  it("prints one line a backup, with kind and base", async () => {
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

  it("ends with 1 and one sentence where the store is missing, with 2 for a wrong command line", async () => {
    const missing = await cli("list", "/nowhere");
    expect(missing).toMatchObject({ code: 1, stdout: "" });
    expect(missing.stderr).toMatch(/^error: Cannot use storage path "\/nowhere": no such file or directory.*\n$/);
    expect((await cli("list", node.storePath, "--vmid", "7")).code).toBe(2);
    expect((await cli("nonsense")).code).toBe(2);
  });
});

describe("pve-backup-host check", () => {
  it("checks the whole chain of a backup", async () => {
    const { code, stdout } = await cli("check", node.storePath, incremental);
    expect(code).toBe(0);
    expect(stdout).toContain("drive-scsi0: 16.0 MiB, 2 images");
    expect(stdout.match(/agrees, tables are sound/g)).toHaveLength(2);
    expect(stdout).toContain(`${incremental} can be restored`);
  });

  it("ends with 4 for a backup that is not there", async () => {
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
    expect(stderr).toContain(`${full}/drive-scsi0.qcow2": its xxh3-128 digest is not the recorded one`);
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
