// SPDX-License-Identifier: AGPL-3.0-or-later
// `pve-backup-host check`: whether one backup can be restored, without restoring it.
import path from "node:path";
import { inspectArchive, verifyArchive } from "../archive/index.ts";
import { ChildProcessError, formatBytes } from "../core/index.ts";
import { openRegularFile } from "../host/index.ts";
import { verifyDigest } from "../qcow2/index.ts";
import { assertSound, type ManifestFile, type Point, PointDamagedError, type Store } from "../store/index.ts";

/**
 * Checks every image of every chain: recorded size and header, digest, tables; each file once. Of a container's backup
 * the archive: size and digest; without a digest, whether it can be listed to its end.
 *
 * @throws PointDamagedError naming the first file that is not what was committed; PointNotFoundError
 */
export async function check(store: Store, archive: string, signal: AbortSignal): Promise<void> {
  const top = await store.openPoint(archive, signal);
  await using _lock = await store.lockChainShared(top, signal);
  const folders = new Set<string>([top.folderName]);
  for (const device of top.devices.keys()) {
    const { folders: chain, paths, sizeBytes } = await store.resolveChain(top, device, signal);
    for (const folder of chain) folders.add(folder);
    console.log(`${device}: ${formatBytes(sizeBytes)}, ${paths.length} image${paths.length === 1 ? "" : "s"}`);
  }
  for (const folder of folders) await checkPoint(await store.openPoint(`${top.vmid}/${folder}`, signal), signal);
  console.log(`${top.archive} can be restored`);
}

async function checkPoint(point: Point, signal: AbortSignal): Promise<void> {
  await point.guestConfig();
  await point.firewallConfig();
  if (point.type === "lxc") return await checkArchive(point, signal);
  for (const { name, path: file } of point.devices.values()) {
    const recorded = digestOf(point, file);
    if (recorded !== undefined && !(await verifyDigest(file, recorded, signal))) throw changed(file, recorded);
    await assertSound(`restore "${point.volname}"`, file, signal);
    console.log(`  ${point.archive} ${name}: ${describe(recorded)}, tables are sound`);
  }
}

async function checkArchive(point: Point, signal: AbortSignal): Promise<void> {
  const { containerArchive: file } = point;
  if (file === undefined) throw new PointDamagedError(`Cannot restore "${point.volname}": it has no archive`);
  const recorded = digestOf(point, file);
  let more = "";
  if (recorded === undefined) {
    more = `, ${await countMembers(file, signal)} members can be listed`;
  } else {
    await using archive = await openRegularFile(file);
    if (!(await verifyArchive(archive, recorded, signal))) throw changed(file, recorded);
  }
  console.log(`  ${point.archive} ${path.basename(file)}: ${describe(recorded)}${more}`);
}

async function countMembers(file: string, signal: AbortSignal): Promise<number> {
  try {
    await using archive = await openRegularFile(file);
    return (await inspectArchive(archive, signal)).members;
  } catch (error) {
    const isDamaged = error instanceof ChildProcessError && error.hint === undefined; // a missing tool has one
    throw isDamaged ? new PointDamagedError(error.message, { cause: error }) : error;
  }
}

type Recorded = ManifestFile["digest"];

const digestOf = (point: Point, file: string): Recorded =>
  point.manifest?.files.find((one) => one.name === path.basename(file))?.digest;

const describe = (recorded: Recorded): string =>
  recorded === undefined ? "no digest is recorded" : `${recorded.algorithm} agrees`;

const changed = (file: string, { algorithm }: NonNullable<Recorded>): PointDamagedError =>
  new PointDamagedError(`Cannot use "${file}": its ${algorithm} digest is not the recorded one`);
