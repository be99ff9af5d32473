// SPDX-License-Identifier: AGPL-3.0-or-later
// `pve-backup-host check`: whether one backup can be restored, without restoring it.
import path from "node:path";
import { formatBytes } from "../core/index.ts";
import { verifyDigest } from "../qcow2/index.ts";
import { assertSound, type Point, PointDamagedError, type Store } from "../store/index.ts";

/**
 * Checks every image of every chain: recorded size and header, digest, tables; each file once.
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
  for (const { name, path: file } of point.devices.values()) {
    const recorded = point.manifest?.files.find((one) => one.name === path.basename(file))?.digest;
    if (recorded !== undefined && !(await verifyDigest(file, recorded, signal))) {
      throw new PointDamagedError(`Cannot use "${file}": its ${recorded.algorithm} digest is not the recorded one`);
    }
    await assertSound(`restore "${point.volname}"`, file, signal);
    const digest = recorded === undefined ? "no digest is recorded" : `${recorded.algorithm} agrees`;
    console.log(`  ${point.archive} ${name}: ${digest}, tables are sound`);
  }
}
