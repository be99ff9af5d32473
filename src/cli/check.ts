// SPDX-License-Identifier: AGPL-3.0-or-later
// `pve-backup-host check`: whether one backup can be restored, without restoring it.
import { inspectArchive, verifyArchive } from "../archive/index.ts";
import { ChildProcessError, formatBytes } from "../core/index.ts";
import type { RegularFile } from "../host/index.ts";
import { parseArchiveName } from "../pve/index.ts";
import { verifyDigest } from "../qcow2/index.ts";
import { assertSound, type ManifestFile, type Point, PointDamagedError, type Store } from "../store/index.ts";

/**
 * Checks every image of every chain: recorded size and header, digest, tables; each file once. Of a container's backup
 * the archive: size and digest; without a digest, whether it can be listed to its end.
 *
 * @throws PointDamagedError naming the first file that is not what was committed; PointNotFoundError
 */
export async function check(store: Store, archive: string, signal: AbortSignal): Promise<void> {
  const name = parseArchiveName(archive);
  await using points = await store.pointsOf(name.vmid);
  await using held = await store.holdChains(points, archive, signal);
  for (const [device, chain] of held.chains) {
    const { length } = chain.images;
    console.log(`${device}: ${formatBytes(chain.sizeBytes)}, ${length} image${length === 1 ? "" : "s"}`);
  }
  for (const one of held.names) await checkPoint(await points.point(one), signal);
  await held.assertHeld(); // what was read may be half of what it was
  console.log(`${name.archive} can be restored`);
}

async function checkPoint(point: Point, signal: AbortSignal): Promise<void> {
  await point.guestConfig();
  await point.firewallConfig();
  if (point.type === "lxc") return await checkArchive(point, signal);
  for (const { name, file: fileName } of point.devices.values()) {
    await using file = await point.openFile(fileName);
    const recorded = digestOf(point, fileName);
    if (recorded !== undefined && !(await verifyDigest(file, recorded, signal))) throw changed(file, recorded);
    await assertSound(`restore "${point.volname}"`, file, signal);
    console.log(`  ${point.archive} ${name}: ${describe(recorded)}, tables are sound`);
  }
}

async function checkArchive(point: Point, signal: AbortSignal): Promise<void> {
  const { containerArchive: name } = point;
  if (name === undefined) throw new PointDamagedError(`Cannot restore "${point.volname}": it has no archive`);
  await using file = await point.openFile(name);
  const recorded = digestOf(point, name);
  let more = "";
  if (recorded === undefined) {
    more = `, ${await countMembers(file, signal)} members can be listed`;
  } else if (!(await verifyArchive(file, recorded, signal))) {
    throw changed(file, recorded);
  }
  console.log(`  ${point.archive} ${name}: ${describe(recorded)}${more}`);
}

async function countMembers(file: RegularFile, signal: AbortSignal): Promise<number> {
  try {
    return (await inspectArchive(file, signal)).members;
  } catch (error) {
    const isDamaged = error instanceof ChildProcessError && error.hint === undefined; // a missing tool has one
    throw isDamaged ? new PointDamagedError(error.message, { cause: error }) : error;
  }
}

type Recorded = ManifestFile["digest"];

const digestOf = (point: Point, file: string): Recorded =>
  point.manifest?.files.find((one) => one.name === file)?.digest;

const describe = (recorded: Recorded): string =>
  recorded === undefined ? "no digest is recorded" : `${recorded.algorithm} agrees`;

const changed = (file: RegularFile, { algorithm }: NonNullable<Recorded>): PointDamagedError =>
  new PointDamagedError(`Cannot use "${file.path}": its ${algorithm} digest is not the recorded one`);
