// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import {
  decodeBytes,
  decodeContainerInfo,
  decodeVmInfo,
  decodeVmVolumes,
  encodeAttributeValue,
  encodeBytes,
  encodeSizes,
  encodeVolumeEntry,
} from "../../../bridge/params.ts";

describe("decodeVmVolumes()", () => {
  it("keeps order, names the fields in camelCase, and has undefined for what is absent", () => {
    const volumes = decodeVmVolumes({
      "drive-scsi1": { size: 1, "bitmap-mode": "none" },
      "drive-scsi0": { size: 2, "bitmap-mode": "reuse", "bitmap-name": "a:b", "nbd-path": "/x" },
    });
    expect([...volumes]).toEqual([
      ["drive-scsi1", { size: 1, bitmapMode: "none", bitmapName: undefined, nbdPath: undefined }],
      ["drive-scsi0", { size: 2, bitmapMode: "reuse", bitmapName: "a:b", nbdPath: "/x" }],
    ]);
  });
});

describe("decodeBytes() and encodeBytes()", () => {
  it("keep every byte value", () => {
    const bytes = Buffer.from(Array.from({ length: 256 }, (_, value) => value));
    expect(decodeBytes(encodeBytes(bytes)).equals(bytes)).toBe(true);
    expect(encodeBytes(Buffer.from([0, 255]))).toBe("AP8="); // by hand: 000000 001111 1111(00)
  });
});

describe("decodeVmInfo()", () => {
  it("takes a missing limit for none, and an empty firewall config for one", () => {
    expect(decodeVmInfo({})).toEqual({ bandwidthLimit: 0, firewallConfig: undefined });
    expect(decodeVmInfo({ "bandwidth-limit": 5, "firewall-config": "" })).toEqual({
      bandwidthLimit: 5,
      firewallConfig: Buffer.alloc(0),
    });
  });
});

describe("decodeContainerInfo()", () => {
  it("takes every field", () => {
    const wire = { directory: "/d", sources: ["./"], "backup-user-id": 100000 };
    expect(decodeContainerInfo(wire)).toEqual({
      directory: "/d",
      sources: ["./"],
      backupUserId: 100000,
      bandwidthLimit: 0,
      firewallConfig: undefined,
    });
  });
});

describe("encodeVolumeEntry()", () => {
  const entry = {
    volname: "backup/100/qemu-1",
    vmid: 100,
    subtype: "qemu",
    ctime: 1,
    size: 2,
    format: "directory",
    protected: false,
  } as const;

  it("leaves out what is undefined", () => {
    expect(encodeVolumeEntry(entry)).toEqual(entry);
  });

  it("passes notes and parent on, and nothing that the protocol does not know", () => {
    const more = { ...entry, notes: "", parent: "backup/100/qemu-0", secret: 1 };
    expect(encodeVolumeEntry(more)).toEqual({ ...entry, notes: "", parent: "backup/100/qemu-0" });
  });
});

describe("encodeSizes() and encodeAttributeValue()", () => {
  it("give plain JSON values", () => {
    expect(encodeSizes(new Map([["a", { size: 3 }]]))).toEqual({ a: { size: 3 } });
    expect(encodeAttributeValue(undefined)).toBeNull();
    expect(encodeAttributeValue(0)).toBe(0);
    expect(encodeAttributeValue("")).toBe("");
  });
});
