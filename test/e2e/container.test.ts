// SPDX-License-Identifier: AGPL-3.0-or-later
// Containers through everything that is ours: Perl shim, two bridges, store, restore; in real user namespaces.
// The judges are GNU tar's extraction in the namespace, and the kernel's view of the extracted tree.
import { lstat, mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { ContainerNode, LEFT_OUT, treeOf, VMID } from "../support/container/container-node.ts";
import { processesNaming } from "../support/programs/processes.ts";
import { requireTool } from "../support/programs/tools.ts";

const MODES = ["tar", "squashfs"] as const;
let node: ContainerNode;

async function setUp(scfg: Record<string, unknown>): Promise<ContainerNode> {
  node = await ContainerNode.create(scfg);
  return node;
}

beforeEach((context) => {
  requireTool(context, "tar", "mksquashfs", "newuidmap", "zstd", "getfattr", "setpriv", "perl");
});

afterEach(async () => {
  expect(await waitForNone(node.dir)).toEqual([]);
  await node[Symbol.asyncDispose]();
});

/** Processes of this test that are still there after some seconds. */
async function waitForNone(text: string): Promise<number[]> {
  for (let n = 0; n < 100 && (await processesNaming(text)).length > 0; n++) await sleep(50);
  return await processesNaming(text);
}

async function mustSucceed(program: { result: Promise<{ status: number | null; output: string }> }): Promise<string> {
  const { status, output } = await program.result;
  expect(output).not.toMatch(/^ERROR/m);
  expect(status, output).toBe(0);
  return output;
}

async function onlyPoint(): Promise<{ volname: string; folder: string }> {
  const points = await node.points();
  expect(points).toHaveLength(1);
  const volname = points[0] ?? "";
  return { volname, folder: path.join(node.storePath, volname.replace("backup/", "")) };
}

describe.each(MODES)("a container with lxc-backup-mode %s", (mode) => {
  it("comes back as it was: owners, modes, times, links, xattrs, contents, mount points", async () => {
    await setUp({ "lxc-backup-mode": mode, "dir-compression": mode === "tar" ? "zlib" : "zstd" });
    const output = await mustSucceed(await node.vzdump());
    expect(output).toMatch(/backup "backup\/101\/lxc-\d+" is complete: /);
    expect(output).not.toMatch(/WARN/);
    const { folder, volname } = await onlyPoint();

    const target = path.join(node.dir, "restored");
    await mustSucceed(await node.restore(volname, target));
    const inMount = await treeOf(path.join(target, "mnt/data"));
    expect(inMount).toEqual(await treeOf(node.dataVolume));
    const inRoot = await treeOf(node.containerRoot, [...LEFT_OUT, "mnt/data"]);
    expect(await treeOf(target, ["mnt/data"])).toEqual(inRoot);
    expect(await readFile(`${target}.conf`)).toEqual(await readFile(path.join(node.dir, "101.conf")));
    expect(await readFile(`${target}.fw`)).toEqual(await readFile(path.join(node.dir, "101.fw")));
    await expectAllOfRoot(folder);
    const manifest = JSON.parse(await readFile(path.join(folder, "manifest.json"), "utf8"));
    expect(manifest.container).toMatchObject({
      archive: mode === "tar" ? "archive.tar.gz" : "archive.sqfs",
      hasSbin: true,
      warnings: 0,
    });
    expect(manifest.container.members).toBeGreaterThan(30);
    expect(manifest.container.totalBytes).toBeGreaterThan(12 * 5000);
  });

  it("is backed up too when it is privileged, where it is mounted and not elsewhere", async () => {
    await setUp({ "lxc-backup-mode": mode });
    await mustSucceed(await node.vzdump({ privileged: 1 }));
    const { folder } = await onlyPoint();
    const manifest = JSON.parse(await readFile(path.join(folder, "manifest.json"), "utf8"));
    expect(manifest.container.hasSbin).toBe(true);
    expect(manifest.container.members).toBeGreaterThan(30);
  });

  it("takes names beyond ASCII, which Proxmox VE hands over as bytes: of mount points and in patterns", async () => {
    await setUp({ "lxc-backup-mode": mode });
    for (const folder of ["mnt/dätä", "home/u/größe"]) await mkdir(path.join(node.containerRoot, folder));
    await writeFile(path.join(node.containerRoot, "home/u/größe/left out"), "");
    const mounts = { "/mnt/dätä": node.dataVolume };
    const output = await mustSucceed(await node.vzdump({ mounts, excludes: ["/home/u/größe/*"] }));
    expect(output).not.toMatch(/WARN/);
    const target = path.join(node.dir, "restored");
    await mustSucceed(await node.restore((await onlyPoint()).volname, target));
    expect(await treeOf(path.join(target, "mnt/dätä"))).toEqual(await treeOf(node.dataVolume));
    expect(await readdir(path.join(target, "home/u/größe"))).toEqual([]);
  });

  it("gives the container's root no way into the store", async () => {
    await setUp({ "lxc-backup-mode": mode });
    const plant = [
      `ls ${node.storePath}/${VMID} && echo planted list`,
      `ln -s /etc/shadow ${node.storePath}/${VMID}/evil && echo planted symlink`,
      `for d in ${node.storePath}/${VMID}/.staging-*; do truncate -s 1P $d/sparse && echo planted sparse; done`,
      `mknod ${node.storePath}/${VMID}/null c 1 3 && echo planted device`,
      `ln /proc/self/fd/0 ${node.storePath}/${VMID}/hard && echo planted link`,
    ];
    const output = await mustSucceed(await node.vzdump({ "in-child": plant.map((code) => ["sh", "-c", code]) }));
    expect(output).not.toMatch(/planted/);
    expect(output.match(/Permission denied/g)?.length).toBeGreaterThanOrEqual(4);
    await expectAllOfRoot((await onlyPoint()).folder);
  });
});

/** Regular files of root alone, each with one name. */
async function expectAllOfRoot(folder: string): Promise<void> {
  expect((await lstat(folder)).mode & 0o777).toBe(0o700);
  for (const name of await readdir(folder)) {
    const found = await lstat(path.join(folder, name));
    expect([name, found.isFile(), found.mode & 0o777, found.uid, found.gid, found.nlink]).toEqual([
      name,
      true,
      0o600,
      0,
      0,
      1,
    ]);
  }
}

describe("a container's backup that fails", () => {
  it("is no backup if the child is killed, although PVE takes that for success", async () => {
    await setUp({});
    const slow = { job: { bwlimit: 20 }, args: ["--kill-child-after-ms", "1500"] };
    const { status, output } = await (await node.vzdump({}, slow)).result;
    expect(status).toBe(1);
    expect(output).toMatch(/Cannot finish the backup of guest 101: nothing was committed/);
    expect(await node.points()).toEqual([]);
    await mustSucceed(await node.vzdump());
  });

  it("leaves nothing when the whole job is killed", async () => {
    await setUp({});
    const program = await node.vzdump({}, { job: { bwlimit: 20 } });
    await program.line(/using backup mechanism/);
    await sleep(1000);
    program.child.kill("SIGKILL");
    await program.result;
    expect(await waitForNone(node.dir)).toEqual([]);
    expect(await node.points()).toEqual([]);
    await mustSucceed(await node.vzdump());
  });

  it("ends at once when the job is interrupted", async () => {
    await setUp({});
    const slow = { job: { bwlimit: 10 }, args: ["--interrupt-after-ms", "1500"] };
    const { status, output } = await (await node.vzdump({}, slow)).result;
    expect(status).not.toBe(0);
    expect(output).toMatch(/interrupted by unexpected signal/);
    expect(await node.points()).toEqual([]);
  });

  it.each(["before-prepare", "after-prepare", "in-child"])("leaves nothing when it fails at %s", async (step) => {
    await setUp({});
    const { status, output } = await (await node.vzdump({}, { args: ["--fail-at", step] })).result;
    expect(status).toBe(1);
    expect(output).toMatch(new RegExp(`failed on purpose at '${step}'`));
    expect(await node.points()).toEqual([]);
    expect(await readdir(path.join(node.root, "run/pve-backup-host")).catch(() => [])).toEqual([]);
  });

  it("keeps the backup when something fails after it", async () => {
    await setUp({});
    const { status, output } = await (await node.vzdump({}, { args: ["--fail-at", "after-backup-container"] })).result;
    expect(status).toBe(1);
    expect(output).toMatch(/WARN: backup "backup\/101\/lxc-\d+" was complete before the job failed and is kept/);
    expect(await node.points()).toHaveLength(1);
  });

  it("says so when backup_container comes without prepare", async () => {
    await setUp({});
    const { output } = await (await node.vzdump({ "skip-prepare": 1 })).result;
    expect(output).toMatch(/ERROR: .*Cannot back up container 101: it was not prepared/);
    expect(await node.points()).toEqual([]);
  });
});

describe("restores of one squashfs backup", () => {
  it("do not meet when two run at once, and leave nothing mounted", async () => {
    await setUp({ "lxc-backup-mode": "squashfs" });
    await mustSucceed(await node.vzdump());
    const { volname } = await onlyPoint();
    const targets = ["one", "two"].map((name) => path.join(node.dir, name));
    const restores = [];
    for (const target of targets)
      restores.push(await node.restore(volname, target, ["--pause-at", "after-restore-init"]));
    await Promise.all(restores.map((restore) => restore.line(/^step after-restore-init/)));
    expect(await readdir(path.join(node.root, "run/pve-backup-host"))).toHaveLength(2);
    for (const restore of restores) restore.child.stdin?.end("\n");
    for (const restore of restores) await mustSucceed(restore);
    const [one = "", two = ""] = targets;
    expect(await treeOf(one)).toEqual(await treeOf(two));
    expect((await treeOf(one)).length).toBeGreaterThan(30);
    expect(await readdir(path.join(node.root, "run/pve-backup-host"))).toEqual([]);
  });

  it("are cleaned up after a failure and after a killed restore", async () => {
    await setUp({ "lxc-backup-mode": "squashfs" });
    await mustSucceed(await node.vzdump());
    const { volname } = await onlyPoint();
    const runDir = path.join(node.root, "run/pve-backup-host");
    const failed = await node.restore(volname, path.join(node.dir, "one"), ["--fail-at", "after-restore-init"]);
    expect((await failed.result).status).toBe(1);
    expect(await readdir(runDir)).toEqual([]);

    const killed = await node.restore(volname, path.join(node.dir, "two"), ["--pause-at", "after-restore-init"]);
    await killed.line(/^step after-restore-init/);
    for (const pid of await processesNaming(node.bundle)) process.kill(pid, "SIGKILL");
    killed.child.kill("SIGKILL");
    await killed.result;
    expect(await readdir(runDir)).toHaveLength(1);
    await mustSucceed(await node.restore(volname, path.join(node.dir, "three")));
    expect(await readdir(runDir)).toEqual([]);
  });
});
