// SPDX-License-Identifier: AGPL-3.0-or-later
import path from "node:path";
import { describe, expect, it } from "vitest";
import { LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { copyDisks, DISK, MIB, never, openJob, VMID } from "../support/vm/vm-rules.ts";

const DATA_BYTES = 60 * MIB;
const LIMIT = 15 * MIB;

describe("bandwidth-limit", () => {
  it("is kept within 5 % by a job of several disks", async () => {
    await using node = await TestNode.create({ "dir-compression": "none" });
    await using guest = await LabGuest.start({
      dir: path.join(node.dir, "vm"),
      root: node.root,
      vmid: VMID,
      storeid: node.storeid,
      disks: [
        { device: DISK, sizeBytes: 64 * MIB },
        { device: "drive-scsi1", sizeBytes: 32 * MIB },
      ],
    });
    await guest.write(DISK, 0, seededBytes(1, (DATA_BYTES * 2) / 3));
    await guest.write("drive-scsi1", 0, seededBytes(2, DATA_BYTES / 3));
    await using provider = node.provider();
    const { access } = await openJob(provider, guest, { epoch: 1000 });
    const startMs = performance.now();
    await copyDisks(provider, guest, access, LIMIT);
    const seconds = (performance.now() - startMs) / 1000;
    await access.finish(true);
    await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never);
    expect(DATA_BYTES / seconds).toBeLessThan(LIMIT * 1.05);
    const lines = node.log.filter((line) => /: +\d+% /.test(line));
    expect(lines.length).toBeGreaterThan(0);
    expect(lines.length).toBeLessThanOrEqual(seconds + 2); // two disks, each with a closing line
  });
});
