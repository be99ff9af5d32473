// SPDX-License-Identifier: AGPL-3.0-or-later
// The store that the test machine restores from: backups of a lab guest with two disks, made on the host.
import path from "node:path";
import { LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import type { TestNode } from "../support/node/test-node.ts";
import { backUp } from "../support/vm/vm-job.ts";
import { contentOf } from "./content.ts";
import type { ExpectedDisk, ExpectedPoint } from "./protocol.ts";

const MIB = 2 ** 20;
const FIRST = "drive-scsi0";
/** Its size is a multiple of 512 and of nothing larger: the last sector must not be lost. */
const SECOND = "drive-scsi1";

/** A full backup and two incremental ones; both disks change between them. @throws Error if a backup fails */
export async function makeStore(node: TestNode): Promise<ExpectedPoint[]> {
  await using guest = await LabGuest.start({
    dir: path.join(node.dir, "vm"),
    root: node.root,
    vmid: 100,
    storeid: node.storeid,
    disks: [
      { device: FIRST, sizeBytes: 24 * MIB },
      { device: SECOND, sizeBytes: 8 * MIB + 512 },
    ],
  });
  await guest.write(FIRST, 0, seededBytes("first", 5 * MIB));
  await guest.write(SECOND, MIB, seededBytes("second", 2 * MIB));
  const points = [await backUpOnce(node, guest, 1_000)];
  await guest.write(FIRST, 9 * MIB, seededBytes("later", MIB));
  await guest.write(SECOND, 8 * MIB, seededBytes("last sector", 512));
  points.push(await backUpOnce(node, guest, 2_000));
  await guest.writeZeroes(FIRST, 0, MIB);
  await guest.write(FIRST, 3 * MIB, seededBytes("again", 70_000));
  points.push(await backUpOnce(node, guest, 3_000));
  return points;
}

async function backUpOnce(node: TestNode, guest: LabGuest, epoch: number): Promise<ExpectedPoint> {
  const job = await backUp(node, guest, { epoch, oracleDir: path.join(node.dir, `oracle-${epoch}`) });
  if (job.volname === undefined) throw new Error(`the backup failed: ${String(job.error)}\n${job.log.join("\n")}`);
  const diskOf = async (device: string): Promise<ExpectedDisk> => {
    return { device, ...(await contentOf(job.oracles.get(device) ?? "no such copy")) };
  };
  return { volname: job.volname, disks: [await diskOf(FIRST), await diskOf(SECOND)] };
}
