// SPDX-License-Identifier: AGPL-3.0-or-later
// Generated manifests: what is taken is exactly what docs/store-format.md allows.
import { describe, expect, it } from "vitest";
import { FileProblem } from "../../../src/host/index.ts";
import { type Manifest, parseManifest } from "../../../src/store/format/manifest.ts";
import { CASES, CASES_TIMEOUT_MS, must } from "../cases.ts";
import { holdToFormat } from "./hold-to-format.ts";
import { fits } from "./shapes.ts";

const UUID = "12345678-9abc-4def-8012-3456789abcde";
const BASE = "00000000-1111-4222-8333-444444444444";
const device = {
  ...{ name: "drive-scsi0", file: "drive-scsi0.qcow2", virtualBytes: 4194304, mode: "full", reason: "first backup" },
  ...{ compression: "zstd", readBytes: 1, writtenBytes: 2, zeroBytes: 3, headerSha256: "0123456789abcdef".repeat(4) },
};
const identity = {
  vmgenid: "11111111-2222-3333-4444-555555555555",
  process: { bootId: BASE, pid: 4711, startTime: "123456" },
};
const head = {
  ...{ format: "pve-backup-host-manifest", version: 1, uuid: UUID, sequence: 7, vmid: 100, epoch: 1700000000 },
  ...{ storeid: "bk", nodename: "pve1", committedAt: "2025-01-01T00:00:00.000Z" },
};
const digest = { algorithm: "xxh3-128", value: "0123456789abcdef".repeat(2) };
const file = (name: string, more: object = {}) => ({ name, sizeBytes: 4096, ...more });
const SOUND: readonly object[] = [
  {
    ...head,
    ...{ type: "qemu", guest: identity, devices: [device] },
    files: [file("guest.conf"), file("drive-scsi0.qcow2", { digest })],
  },
  {
    ...head,
    ...{ type: "qemu", guest: {} },
    devices: [
      { ...device, mode: "incremental", reason: "", base: { folder: "qemu-1600000000", uuid: BASE } },
      { ...device, name: "drive-efidisk0", file: "drive-efidisk0.qcow2" },
    ],
    files: [file("guest.conf"), file("drive-scsi0.qcow2"), file("drive-efidisk0.qcow2"), file("firewall.conf")],
  },
  {
    ...head,
    ...{ type: "lxc", guest: {}, devices: [] },
    container: { archive: "archive.tar.zst", members: 12, totalBytes: 4096, hasSbin: true, warnings: 0 },
    files: [file("guest.conf"), file("archive.tar.zst", { digest: { algorithm: "sha256", value: "ab".repeat(32) } })],
  },
];

const isShape = fits("manifest");

/** What a schema cannot say. */
function isConsistent(text: string): boolean {
  const { uuid, type, devices, files, container } = JSON.parse(text) as Manifest;
  const names = files.map(({ name }) => name);
  const isListed = (name: string): boolean => names.filter((one) => one === name).length === 1;
  return (
    names.every(isListed) &&
    devices.every((one) => isListed(one.file) && devices.filter(({ name }) => name === one.name).length === 1) &&
    devices.every((one) => !one.base || one.base.uuid !== uuid) &&
    (!container || (type === "lxc" && isListed(container.archive)))
  );
}

describe("parseManifest()", () => {
  it(
    "takes exactly what the format allows, and says of the rest in one line what is wrong",
    () => {
      const tally = holdToFormat(
        {
          sound: SOUND,
          parse: parseManifest,
          allows: (text) => isShape(text) && isConsistent(text),
          check: (manifest, text) => {
            const said = JSON.parse(text) as Record<string, unknown>;
            for (const [name, value] of Object.entries(manifest)) {
              if (typeof value !== "object") must(value === said[name], `${name} is what the file says`);
            }
          },
        },
        61,
        CASES,
      );
      tally.expectAtLeast({
        sound: 10_000,
        "taken in spite of an edit": 5000,
        "no JSON": 3000,
        "it is not a JSON object": 500,
        "it is not a pve-backup-host-manifest file": 500,
        "field sequence is not a whole number in range": 500,
        "a file is listed twice": 300,
        "field devices[#].base does not fit the mode": 50,
        "it was written by a newer version (format #, this version reads up to #)": 50,
        "field files[#].name is not a plain file name": 200,
        "the container's archive is not listed": 50,
      });
    },
    CASES_TIMEOUT_MS,
  );

  it("is not overwhelmed by a manifest of 16 MiB that is nothing but brackets or files", () => {
    const brackets = Buffer.alloc(16 * 2 ** 20, "[");
    expect(() => parseManifest(brackets)).toThrow(FileProblem);
    const closed = Buffer.concat([brackets.subarray(0, 2 ** 20), Buffer.alloc(2 ** 20, "]")]);
    expect(() => parseManifest(closed)).toThrow(FileProblem);
    const files = Array.from({ length: 100_000 }, (_, index) => file(`f${index}`));
    expect(() => parseManifest(Buffer.from(JSON.stringify({ ...SOUND[0], files })))).toThrow(/too long/);
  });
});
