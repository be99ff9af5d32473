// SPDX-License-Identifier: AGPL-3.0-or-later
// Finds out whether one backup can be restored, by reading all of it: every file of every chain.

import { verifyFile } from "../digest/index.ts";
import { parseArchiveName } from "../pve/index.ts";
import { DIGEST_ORDER } from "../qcow2/index.ts";
import { assertSound, type Point, PointDamagedError, type Store } from "../store/index.ts";
import {
  containerArchiveOf,
  listArchive,
  type PointFile,
  type RecordedDigest,
  recordedDigest,
  refuseUnrestorable,
} from "./container.ts";

/** What was found to be in order; anything else is thrown. */
export type Finding =
  | { readonly kind: "chain"; readonly device: string; readonly sizeBytes: number; readonly images: number }
  | {
      readonly kind: "image";
      readonly archive: string;
      readonly device: string;
      /** Algorithm of the digest that matched; undefined if none was recorded. */
      readonly algorithm: string | undefined;
    }
  | {
      readonly kind: "archive";
      readonly archive: string;
      readonly file: string;
      readonly algorithm: string | undefined;
      /** How many members were listed; undefined if the digest made that unnecessary. */
      readonly members: number | undefined;
    }
  | { readonly kind: "whole"; readonly archive: string; readonly isPrivileged: boolean };

type Report = (finding: Finding) => Promise<void>;

/**
 * Reads every image of every chain once: recorded size and header, digest, tables. For a container's backup it checks
 * the archive: size and digest, or, without a digest, whether it can be listed to its end. Holds readers' locks
 * meanwhile.
 *
 * @param archive archive or volume name
 * @param report called whenever something is found to be in order
 * @throws PointDamagedError naming the first file that is not what was committed; NotFoundError;
 *   UnsupportedError if the backup is undamaged and Proxmox VE would refuse to restore it; NewerFormatError;
 *   EnvironmentError; LockedError
 */
export async function verifyPoint(store: Store, archive: string, signal: AbortSignal, report: Report): Promise<void> {
  const name = parseArchiveName(archive);
  await using points = await store.pointsOf(name.vmid);
  await using held = await store.holdChains(points, archive, signal);
  for (const [device, { images, sizeBytes }] of held.chains) {
    await report({ kind: "chain", device, sizeBytes, images: images.length });
  }
  for (const one of held.names) await verifyFiles(await points.point(one), signal, report);
  await held.assertHeld(); // what was read may be half of what it was
  const top = await points.point(name);
  const isPrivileged = top.type === "lxc" && !isUnprivileged(await top.guestConfig());
  await report({ kind: "whole", archive: top.archive, isPrivileged });
}

async function verifyFiles(point: Point, signal: AbortSignal, report: Report): Promise<void> {
  await point.guestConfig();
  await point.firewallConfig();
  if (point.type === "lxc") return await verifyContainer(point, signal, report);
  for (const { name: device, file: fileName } of point.devices.values()) {
    await using file = await point.openFile(fileName);
    const recorded = recordedDigest(point, fileName);
    if (recorded !== undefined && !(await verifyFile(file, recorded, signal, DIGEST_ORDER)))
      throw mismatch(file, recorded);
    await assertSound(`restore "${point.volname}"`, file, signal);
    await report({ kind: "image", archive: point.archive, device, algorithm: recorded?.algorithm });
  }
}

async function verifyContainer(point: Point, signal: AbortSignal, report: Report): Promise<void> {
  if (point.containerArchive === undefined) {
    throw new PointDamagedError(`Cannot restore "${point.volname}": it has no archive`);
  }
  const name = containerArchiveOf(point);
  await using file = await point.openFile(name);
  const recorded = recordedDigest(point, name);
  const listed = recorded === undefined ? await listArchive(file, signal) : undefined;
  if (recorded !== undefined && !(await verifyFile(file, recorded, signal))) throw mismatch(file, recorded);
  const { archive } = point;
  await report({ kind: "archive", archive, file: name, algorithm: recorded?.algorithm, members: listed?.members });
  const contents = listed ?? point.manifest?.container;
  if (contents !== undefined) refuseUnrestorable(point, name, contents);
}

/** The line of a container's own configuration, above its snapshots. Source: pct.conf(5). */
function isUnprivileged(guestConfig: Buffer): boolean {
  const current = guestConfig.toString("latin1").split(/^\[/m, 1)[0] ?? "";
  return /^unprivileged: *1\s*$/m.test(current);
}

const mismatch = (file: PointFile, { algorithm }: RecordedDigest): PointDamagedError =>
  new PointDamagedError(`Cannot use "${file.path}": checksum mismatch (${algorithm})`);
