// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { socketBeside } from "../../../src/source/file-handle-source.ts";

const DISK = "drive-scsi0";

describe("socketBeside()", () => {
  it("knows where PVE's NBD socket is from the path of its FUSE file", () => {
    const root = "/run/qemu-server/100.backup-access.4711";
    const file = `${root}/100-nbd.backup-access.drive-scsi0.4711/drive-scsi0`;
    expect(socketBeside(file, DISK)).toBe(`${root}/100-nbd.backup-access`);
  });

  it.each([
    "/run/x/100-nbd.backup-access.drive-scsi1.4711/drive-scsi0", // of another device
    "/run/x/100-nbd.backup-access.drive-scsi0.4711/drive-scsi1",
    "/run/x/100-nbd.backup-access.drive-scsi0/drive-scsi0", // no pid
    "/run/x/.drive-scsi0.4711/drive-scsi0", // no socket
    "/run/x/100-nbd.backup-accessXdrive-scsi0.4711/drive-scsi0",
    "/mnt/disk.raw",
    "/run/x/100-nbd.backup-access.drive-scsi0.4711/drive-scsi0 (deleted)",
  ])("does not guess: %s", (file) => {
    expect(socketBeside(file, DISK)).toBeUndefined();
  });
});
