// SPDX-License-Identifier: AGPL-3.0-or-later
// A container's backup that lost its manifest and the end of its archive is not one of the upstream example's, which
// have no manifest by nature; those stay what they are.
import { mkdir, readdir, rm, stat, truncate, writeFile } from "node:fs/promises";
import path from "node:path";
import { beforeEach, describe, expect, it } from "vitest";
import { runTool } from "../../fixtures/lab/index.ts";
import {
  backUpContainer,
  type ContainerFormat,
  CT_VMID,
  makeTree,
  pack,
} from "../support/container/container-point.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { list } from "../support/vm/vm-job.ts";
import { never, refusalOf } from "../support/vm/vm-rules.ts";

beforeEach((context) => requireTool(context, "tar", "mksquashfs", "unsquashfs", "zstd"));

const FORMATS: readonly ContainerFormat[] = ["tar", "tar.zst", "sqfs"];
const TAR_BLOCK_BYTES = 512;

const cuts: ReadonlyArray<readonly [string, (size: number) => number]> = [
  ["ten bytes", () => 10],
  // Where a block of tar ends: what is left of it has nothing wrong.
  ["a half", (size) => Math.floor(size / 2 / TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES],
];

describe.each(FORMATS)("a container's backup (%s) without its manifest", (format) => {
  it.each(cuts)("and with %s of its archive is neither listed nor restored", async (_what, lengthOf) => {
    await using node = await TestNode.create();
    const volname = await backUpContainer(node, { epoch: 1000, format });
    const folder = path.join(node.storePath, volname.replace("backup/", ""));
    const archive = path.join(folder, `archive.${format}`);
    expect(await readdir(folder)).toEqual(expect.arrayContaining(["manifest.json", path.basename(archive)]));
    await rm(path.join(folder, "manifest.json"));
    await truncate(archive, lengthOf((await stat(archive)).size));
    node.log.length = 0;

    expect(await list(node, CT_VMID)).toEqual([]);
    expect(node.log.join("\n")).toMatch(/^warn: .*lxc-1000/m);
    await using provider = node.provider();
    const { code, message } = await refusalOf(provider.restore.restoreGetMechanism(volname, never));
    expect(code).toBe("DAMAGED");
    expect(message).toMatch(/^Cannot [^\n]*lxc-1000[^\n]*$/);
    expect((await refusalOf(provider.restore.restoreContainerInit(volname, never))).code).toBe("DAMAGED");
    expect(await readdir(folder)).toContain(path.basename(archive)); // nothing is removed
  });
});

describe.each(["tar", "sqfs"] as const)("a whole folder of the upstream example (%s)", (format) => {
  it("is listed, and offers its archive", async () => {
    await using node = await TestNode.create();
    const tree = path.join(node.dir, "tree");
    await makeTree(tree);
    const folder = path.join(node.storePath, `${CT_VMID}/lxc-500`);
    await mkdir(folder, { recursive: true });
    await writeFile(path.join(folder, "guest.conf"), "hostname: old\n");
    await pack(format, tree, path.join(folder, `archive.${format}`));

    const volname = `backup/${CT_VMID}/lxc-500`;
    expect(await list(node, CT_VMID)).toEqual([volname]);
    expect(node.log).toEqual([]);
    await using provider = node.provider();
    expect((await provider.restore.archiveGetGuestConfig(volname, never)).toString()).toBe("hostname: old\n");
    const offer = await provider.restore.restoreContainerInit(volname, never);
    const target = path.join(node.dir, "restored");
    await mkdir(target);
    if ("tarPath" in offer) await runTool("tar", ["xf", offer.tarPath, "-C", target]);
    else await runTool("cp", ["-a", `${offer.archiveDirectory}/.`, target]);
    await runTool("diff", ["-r", tree, target]);
    await provider.restore.restoreContainerCleanup(volname);
    const beside = await backUpContainer(node, { epoch: 1000, format });
    expect((await list(node, CT_VMID)).sort()).toEqual([beside, volname].sort());
  });
});
