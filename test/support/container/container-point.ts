// SPDX-License-Identifier: AGPL-3.0-or-later
// One container's backup by the hooks, without a container: its files are made here, and the archiver is played.
import { mkdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { runTool, seededBytes } from "../../../fixtures/lab/index.ts";
import type { TestNode } from "../node/test-node.ts";
import { never } from "../vm/vm-rules.ts";
import { packTree, playArchiver } from "./archiver.ts";

export const CT_VMID = 101;
/** How the archive is made; the provider's options for it are in CONTAINER_OPTIONS. */
export type ContainerFormat = "tar" | "tar.zst" | "sqfs";

const CONTAINER_OPTIONS: Readonly<Record<ContainerFormat, Record<string, string>>> = {
  tar: { "lxc-backup-mode": "tar", "dir-compression": "none" },
  "tar.zst": { "lxc-backup-mode": "tar", "dir-compression": "zstd" },
  sqfs: { "lxc-backup-mode": "squashfs", "dir-compression": "none" },
};

/** A tree that Proxmox VE would restore: with `sbin`, more than ten members, and incompressible content. */
export async function makeTree(folder: string): Promise<void> {
  await mkdir(path.join(folder, "sbin"), { recursive: true });
  await writeFile(path.join(folder, "sbin/init"), "init\n");
  for (let n = 0; n < 12; n++) await writeFile(path.join(folder, `file-${n}`), seededBytes(`ct ${n}`, 40_000));
}

/** Packs a tree as a user of stock tools would. */
export async function pack(format: ContainerFormat, tree: string, archive: string): Promise<void> {
  if (format === "tar.zst") await runTool("tar", ["-I", "zstd", "-cf", archive, "-C", tree, "."]);
  else await packTree(format === "tar" ? "tar" : "squashfs", tree, archive);
}

/** @returns the volume name */
export async function backUpContainer(
  node: TestNode,
  { epoch, format, guestConfig }: { epoch: number; format: ContainerFormat; guestConfig?: string },
): Promise<string> {
  const tree = path.join(node.dir, `tree-${epoch}`);
  await makeTree(tree);
  await using provider = node.provider(CONTAINER_OPTIONS[format]);
  await provider.backup.jobInit();
  const { archiveName } = await provider.backup.backupInit(CT_VMID, "lxc", epoch, never);
  const info = { directory: tree, sources: ["./"], backupUserId: 0, bandwidthLimit: 0, firewallConfig: undefined };
  const handoff = await provider.backup.backupContainerPrepare(CT_VMID, info, never);
  await playArchiver(handoff, (archive) => pack(format, tree, archive), guestConfig);
  await provider.backup.backupCleanup(CT_VMID, "lxc", true, undefined, never);
  await provider.backup.jobCleanup(never);
  return `backup/${archiveName}`;
}
