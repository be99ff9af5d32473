// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { RequestError } from "../../../../src/core/index.ts";
import { parseArchiveName } from "../../../../src/pve/archive-name.ts";
import { isDeviceName } from "../../../../src/pve/device.ts";
import { checkDeviceName, checkVmid } from "../../../../src/pve/index.ts";
import { backingFileName } from "../../../../src/store/index.ts";

describe("isDeviceName()", () => {
  it.each(["drive-scsi0", "drive-tpmstate0-backup", "a", "0", "a.b_c-d", "x".repeat(64)])("takes %j", (name) => {
    expect(isDeviceName(name)).toBe(true);
  });

  it.each(["", ".", "..", "-a", ".a", "a/b", "../a", "a b", "a\0b", "a\n", "ä", "x".repeat(65), "x".repeat(300)])(
    "refuses %j",
    (name) => {
      expect(isDeviceName(name)).toBe(false);
      expect(() => checkDeviceName(name)).toThrow(RequestError);
    },
  );

  it("keeps hostile names short and printable in messages", () => {
    const error = (() => {
      try {
        return checkDeviceName(`\n\0${"x".repeat(300)}`);
      } catch (thrown) {
        return String(thrown);
      }
    })();
    expect(error.length).toBeLessThan(200);
    expect(error).not.toMatch(/[\n\0]/);
  });
});

describe("parseArchiveName()", () => {
  it("splits a name into what it says", () => {
    expect(parseArchiveName("backup/100/lxc-1700000000")).toEqual({
      archive: "100/lxc-1700000000",
      vmid: 100,
      folderName: "lxc-1700000000",
      type: "lxc",
      epoch: 1_700_000_000,
    });
  });
});

describe("checkVmid()", () => {
  it.each([99, 0, -100, 100.5, 1_000_000_000, Number.NaN, Number.POSITIVE_INFINITY])("refuses %d", (vmid) => {
    expect(() => checkVmid(vmid)).toThrow(RequestError);
  });
});

describe("backingFileName()", () => {
  it("is relative and one folder up", () => {
    expect(backingFileName("qemu-5", "drive-scsi0")).toBe("../qemu-5/drive-scsi0.qcow2");
  });
});
