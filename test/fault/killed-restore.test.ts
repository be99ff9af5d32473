// SPDX-License-Identifier: AGPL-3.0-or-later
// The process of a restore ends with a raw disk on offer: no server and no mount may outlive it for long.
import { readdir, readFile } from "node:fs/promises";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { compareRaw } from "../../fixtures/lab/index.ts";
import { type BridgeBundle, BridgeProcess, buildBridge } from "../support/bridge/bridge-process.ts";
import { TestNode } from "../support/node/test-node.ts";
import { processesNaming } from "../support/programs/processes.ts";
import { DISK, expectRestores, mustBackUp, type SafeBackup, startGuest } from "../support/vm/vm-rules.ts";

let bundle: BridgeBundle;
beforeAll(async () => {
  bundle = await buildBridge();
});
afterAll(() => bundle[Symbol.asyncDispose]());

const mountsOf = async (node: TestNode): Promise<string[]> =>
  (await readFile("/proc/self/mounts", "utf8")).split("\n").filter((line) => line.includes(node.dir));
const runDir = (node: TestNode): string => path.join(node.root, "run/pve-backup-host");
const viewsOf = async (node: TestNode): Promise<string[]> => await readdir(runDir(node));

/** A restore in a process of its own, up to the offered disk, which is right. */
async function offer(node: TestNode, backup: SafeBackup): Promise<BridgeProcess> {
  const bridge = await BridgeProcess.start(bundle, node);
  const { volname } = backup;
  await bridge.call("restore_get_mechanism", { volname });
  await bridge.call("restore_vm_init", { volname });
  const offered = await bridge.call("restore_vm_volume_init", { volname, "device-name": DISK });
  expect(await compareRaw(String(offered?.["qemu-img-path"]), backup.oracles.get(DISK) ?? "none")).toMatchObject({
    identical: true,
  });
  expect(await mountsOf(node)).toHaveLength(1);
  return bridge;
}

async function backedUp(node: TestNode): Promise<SafeBackup> {
  await using guest = await startGuest(node);
  return await mustBackUp(node, guest, { epoch: 1000 });
}

describe("a restore process killed with -9", () => {
  it("leaves no server, and no mount after the next restore has swept", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    const backup = await backedUp(node);
    await using bridge = await offer(node, backup);
    await bridge.end("SIGKILL");
    await expectRestores(node, backup); // sweeps first
    expect(await mountsOf(node)).toEqual([]);
    expect(await viewsOf(node)).toEqual([]);
    expect(await processesNaming(node.root)).toEqual([]);
    await using guest = await startGuest(node);
    await mustBackUp(node, guest, { epoch: 2000 }); // the reader's lock of the dead does not last
    expect(await readdir(path.join(node.storePath, "100/.locks")).catch(() => [])).toEqual([]);
  });
});

describe("a restore process that is asked to end", () => {
  it.each(["SIGTERM", "EOF"] as const)("by %s takes server, mount and folder with it", async (how) => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    const backup = await backedUp(node);
    await using bridge = await offer(node, backup);
    await bridge.end(how);
    expect(await mountsOf(node)).toEqual([]);
    expect(await viewsOf(node)).toEqual([]);
    expect(await processesNaming(node.root)).toEqual([]);
    expect(await readdir(path.join(node.storePath, "100/.locks")).catch(() => [])).toEqual([]);
  });
});
