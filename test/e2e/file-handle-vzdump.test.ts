// SPDX-License-Identifier: AGPL-3.0-or-later
// Mechanism "file-handle" all the way: the scripted vzdump under perl -T, with a real nbdfuse, nbdinfo and IO::File,
// and the bundled bridge.
import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { LabControl, type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { type BridgeBundle, buildBridge } from "../support/bridge/bridge-process.ts";
import { TestNode } from "../support/node/test-node.ts";
import { processesNaming } from "../support/programs/processes.ts";
import { type ProgramResult, startScript, watch } from "../support/programs/scripted-pve.ts";
import { list } from "../support/vm/vm-job.ts";
import { DISK, DISK_BYTES, expectRestores, MIB, startGuest, VMID } from "../support/vm/vm-rules.ts";

let bundle: BridgeBundle;
beforeAll(async () => {
  bundle = await buildBridge();
});
afterAll(async () => await bundle[Symbol.asyncDispose]());

/** One job of the scripted vzdump. */
async function vzdump(node: TestNode, guest: LabGuest, job: object, ...args: string[]): Promise<ProgramResult> {
  const config = path.join(node.dir, "100.conf");
  await writeFile(config, guest.guestConfig);
  const jobFile = path.join(node.dir, "job.json");
  const scfg = { path: node.storePath, "vm-backup-mode": "incremental", "vm-backup-mechanism": "file-handle" };
  const devices = Object.fromEntries(guest.devices);
  await writeFile(
    jobFile,
    JSON.stringify({
      ...{ storeid: node.storeid, scfg, "log-dir": node.dir, "lab-socket": path.join(node.dir, "lab.sock") },
      guests: [{ vmid: VMID, config, devices, ...job }],
      ...job,
    }),
  );
  const options = { bridge: bundle.path, root: node.root };
  return await watch(startScript("vzdump.pl", ["--job", jobFile, ...args], options)).result;
}

/** A guest whose backup access the scripted vzdump can ask for. */
async function openLab(
  node: TestNode,
  guest: LabGuest,
): Promise<{ lab: LabControl; oracle: (epoch: number) => string }> {
  let jobs = 0;
  const lab = await LabControl.open({
    guests: [guest],
    socketPath: path.join(node.dir, "lab.sock"),
    oracleDir: () => path.join(node.dir, `oracle-${++jobs}`),
  });
  return { lab, oracle: (job) => path.join(node.dir, `oracle-${job}`, `${DISK}.raw`) };
}

/** No process of the job, no mount. */
async function expectNothingLeft(node: TestNode): Promise<void> {
  expect(await readFile("/proc/self/mountinfo", "utf8")).not.toContain(`${node.dir}/`);
  expect(await processesNaming(`${node.dir}/vm/${VMID}-nbd.backup-access`)).toEqual([]);
}

describe("vzdump with file handles", () => {
  it("makes full, incremental and empty backups that restore", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    const { lab, oracle } = await openLab(node, guest);
    await using _lab = lab;
    const points: Array<{ volname: string; oracles: Map<string, string> }> = [];
    for (const [at, said] of [
      [1, /drive-scsi0: full backup of 24\.0 MiB \(first backup\)/],
      [2, /drive-scsi0: incremental backup \(.* of 24\.0 MiB changed since "backup\/100\/qemu-1001"\)/],
      [3, /drive-scsi0: nothing changed/],
    ] as const) {
      const { status, output } = await vzdump(node, guest, { "backup-time": 1000 + at });
      expect(status, output).toBe(0);
      expect(output).toContain("using backup mechanism 'file-handle'");
      expect(output).toMatch(said);
      expect(output).not.toMatch(/WARN|all of it is read/);
      points.push({ volname: `backup/100/qemu-${1000 + at}`, oracles: new Map([[DISK, oracle(at)]]) });
      await expectNothingLeft(node);
      if (at === 1) await guest.write(DISK, 10 * MIB, seededBytes("changed", MIB));
    }
    await expectRestores(node, ...points);
  });

  it("that is interrupted in mid-copy ends in order, and the next backup is right", async () => {
    await using node = await TestNode.create();
    await using guest = await startGuest(node);
    await guest.write(DISK, 0, seededBytes("all", DISK_BYTES));
    const { lab, oracle } = await openLab(node, guest);
    await using _lab = lab;
    const slow = { "backup-time": 1001, bwlimit: 1024 };
    const { status, output } = await vzdump(node, guest, slow, "--interrupt-after-ms", "1500");
    expect(status).not.toBe(0);
    expect(output).toMatch(/interrupted by signal/);
    await expectNothingLeft(node);
    expect(await list(node, VMID)).toEqual([]);
    const next = await vzdump(node, guest, { "backup-time": 1002 });
    expect(next.status, next.output).toBe(0);
    await expectRestores(node, { volname: "backup/100/qemu-1002", oracles: new Map([[DISK, oracle(2)]]) });
  });
});
