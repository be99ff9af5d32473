// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { cp, mkdir, readFile, rename, rm, symlink, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { NotFoundError, UnsupportedError } from "../../../src/core/index.ts";
import { assertSound, type Point, PointDamagedError, type Store } from "../../../src/store/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { openImages } from "../../support/qcow2/open-images.ts";
import {
  backup,
  createLab,
  editJson,
  imageBytes,
  type Lab,
  legacyImageBytes,
  MIB,
  makeLegacy,
  NEVER,
  resolveChain,
} from "./lab.ts";

let lab: Lab;
let store: Store;
beforeEach(async () => {
  lab = await createLab();
  store = await lab.open();
});
afterEach(async () => await lab[Symbol.asyncDispose]());

const resolve = async (archive: string, device = "drive-scsi0") =>
  await resolveChain(store, await store.openPoint(archive, NEVER), device, NEVER);
/** As a restore does before it begins. */
const checked = async (archive: string) => {
  const chain = await resolve(archive);
  await using images = await openImages(chain.paths);
  for (const file of images.files) await assertSound(`restore "${archive}"`, file, NEVER);
  return chain;
};
const disk = (folder: string): string => join(lab.path, "100", folder, "drive-scsi0.qcow2");

/** Replaces an image and makes the manifest agree about size and header: only its content is wrong. */
async function forge(folder: string, bytes: Buffer): Promise<void> {
  await writeFile(disk(folder), bytes);
  const headerSha256 = createHash("sha256").update(bytes.subarray(0, 65536)).digest("hex");
  await editJson(join(lab.path, "100", folder, "manifest.json"), (manifest) => {
    const [device] = manifest.devices as Array<Record<string, unknown>>;
    if (device !== undefined) device.headerSha256 = headerSha256;
    for (const file of manifest.files as Array<Record<string, unknown>>) {
      if (file.name === "drive-scsi0.qcow2") file.sizeBytes = bytes.length;
    }
  });
}

function patched(bytes: Buffer, write: (bytes: Buffer) => void): Buffer {
  write(bytes);
  return bytes;
}

describe("Store.resolveChain()", () => {
  let full: Point;
  beforeEach(async () => {
    full = await backup(store, { epoch: 1000 });
    const second = await backup(store, { epoch: 2000, base: full });
    await backup(store, { epoch: 1500, base: second }); // the clock jumped back
  });

  it("gives the top first and the full image last", async () => {
    expect(await resolve("100/qemu-1500")).toEqual({
      paths: [disk("qemu-1500"), disk("qemu-2000"), disk("qemu-1000")],
      folders: ["qemu-1500", "qemu-2000", "qemu-1000"],
      sizeBytes: 64 * MIB,
    });
  });

  it("works after the store was moved", async () => {
    await rename(lab.path, `${lab.path}.moved`);
    const moved = await lab.open({ path: `${lab.path}.moved` });
    const point = await moved.openPoint("100/qemu-1500", NEVER);
    expect((await resolveChain(moved, point, "drive-scsi0", NEVER)).paths).toHaveLength(3);
  });

  it("does not know a device that the point does not hold", async () => {
    await expect(resolve("100/qemu-1000", "drive-scsi9")).rejects.toThrow(NotFoundError);
    await expect(resolve("100/qemu-1000", "../../etc/passwd")).rejects.toThrow(NotFoundError);
  });

  it("refuses a base that is gone, and one that is another backup", async () => {
    await cp(full.path, `${full.path}.kept`, { recursive: true });
    await rm(full.path, { recursive: true });
    await expect(resolve("100/qemu-2000")).rejects.toThrow(/its base qemu-1000 is missing/);
    await rename(`${full.path}.kept`, full.path);
    await editJson(join(full.path, "manifest.json"), (manifest) => {
      manifest.uuid = "77777777-2222-3333-4444-555555555555";
    });
    await expect(resolve("100/qemu-2000")).rejects.toThrow(/its base qemu-1000 is another backup/);
  });

  it("refuses a cycle and a base that is not older by sequence", async () => {
    await editJson(join(full.path, "manifest.json"), (manifest) => {
      manifest.sequence = 2;
    });
    await expect(resolve("100/qemu-2000")).rejects.toThrow(/its base qemu-1000 is not older/);
  });

  it("refuses a link in place of an image, an image folder, a pipe", async () => {
    const bytes = await readFile(disk("qemu-1000"));
    const elsewhere = join(lab.root, "elsewhere.qcow2");
    await writeFile(elsewhere, bytes);
    const point = await store.openPoint("100/qemu-2000", NEVER);
    for (const plant of [
      () => symlink(elsewhere, disk("qemu-1000")),
      () => mkdir(disk("qemu-1000")),
      async () => void execFileSync("mkfifo", [disk("qemu-1000")]),
    ]) {
      await rm(disk("qemu-1000"), { recursive: true });
      await plant();
      await expect(resolveChain(store, point, "drive-scsi0", NEVER)).rejects.toThrow(PointDamagedError);
    }
  });

  it("refuses a link in place of the top's image after the point was opened", async () => {
    const point = await store.openPoint("100/qemu-1000", NEVER);
    await rename(disk("qemu-1000"), `${disk("qemu-1000")}.real`);
    await symlink("drive-scsi0.qcow2.real", disk("qemu-1000"));
    await expect(resolveChain(store, point, "drive-scsi0", NEVER)).rejects.toThrow(/symbolic link/);
  });

  it("refuses a folder that is a link to another guest's", async () => {
    await mkdir(join(lab.path, "101"));
    await rename(full.path, join(lab.path, "101/qemu-1000"));
    await symlink("../101/qemu-1000", full.path);
    await expect(resolve("100/qemu-2000")).rejects.toThrow(/it is a symbolic link, not a directory/);
  });

  const hostile: Array<[string, (bytes: Buffer) => Buffer, RegExp]> = [
    ["an external data file", (b) => patched(b, (at) => at.writeBigUInt64BE(4n, 72)), /data in another file/],
    ["encryption", (b) => patched(b, (at) => at.writeUInt32BE(2, 32)), /encrypted/],
    [
      "an unknown incompatible feature",
      (b) => patched(b, (at) => at.writeBigUInt64BE(1n << 40n, 72)),
      /unknown incompatible/,
    ],
    ["another virtual size", () => imageBytes(65 * MIB), /virtual size is 68157440, expected 67108864/],
    ["an unrecorded backing file", () => imageBytes(64 * MIB, "/etc/passwd"), /names backing file "\/etc\/passwd"/],
    ["no qcow2 header", () => Buffer.alloc(65536), /not a qcow2 image/],
    ["nothing", () => Buffer.alloc(0), /0 bytes/],
  ];
  it.each(hostile)("refuses an image with %s, although the manifest agrees", async (_what, change, message) => {
    await forge("qemu-1000", change(imageBytes(64 * MIB)));
    await expect(resolve("100/qemu-2000")).rejects.toThrow(PointDamagedError);
    await expect(resolve("100/qemu-2000")).rejects.toThrow(message);
  });

  it("refuses an incremental whose header names another base, no base, or another format", async () => {
    for (const bytes of [
      imageBytes(64 * MIB, "../qemu-1500/drive-scsi0.qcow2"),
      imageBytes(64 * MIB, "../../100/qemu-1000/drive-scsi0.qcow2"),
      imageBytes(64 * MIB),
      imageBytes(64 * MIB, "../qemu-1000/drive-scsi0.qcow2", "raw"),
    ]) {
      await forge("qemu-2000", bytes);
      await expect(resolve("100/qemu-2000")).rejects.toThrow(PointDamagedError);
    }
    await forge("qemu-2000", imageBytes(64 * MIB, "../qemu-1000/drive-scsi0.qcow2"));
    expect((await resolve("100/qemu-2000")).paths).toHaveLength(2);
  });

  it("refuses a changed header byte that no field lives in", async () => {
    const bytes = await readFile(disk("qemu-1000"));
    bytes[50_000] = 1;
    await writeFile(disk("qemu-1000"), bytes);
    await expect(resolve("100/qemu-2000")).rejects.toThrow(/header checksum mismatch/);
  });
});

describe("legacy chains", () => {
  const size = 8 * MIB;

  it("map absolute backing paths by their last two components, also after a move", async (context) => {
    requireTool(context, "qemu-img");
    const base = await makeLegacy(lab, "qemu-100", { "drive-scsi0": Buffer.alloc(0) });
    const top = await makeLegacy(lab, "qemu-200", { "drive-scsi0": Buffer.alloc(0) });
    const [baseDisk, topDisk] = [join(base, "drive-scsi0.qcow2"), join(top, "drive-scsi0.qcow2")];
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", baseDisk, String(size)]);
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", "-b", baseDisk, "-F", "qcow2", topDisk]);
    await rename(lab.path, `${lab.path}.moved`);
    const moved = await lab.open({ path: `${lab.path}.moved` });
    const point = await moved.openPoint("100/qemu-200", NEVER);
    expect(point.kind).toBe("legacy");
    expect(point.devices.get("drive-scsi0")).toMatchObject({ virtualBytes: size, mode: "incremental" });
    expect(await resolveChain(moved, point, "drive-scsi0", NEVER)).toEqual({
      paths: [topDisk, baseDisk].map((path) => path.replace(lab.path, `${lab.path}.moved`)),
      folders: ["qemu-200", "qemu-100"],
      sizeBytes: size,
    });
  });

  it.each([
    ["a path outside", "/etc/passwd"],
    ["another kind of folder", "/store/100/qemu-1.bak/drive-scsi0.qcow2"],
    ["no disk", "/store/100/qemu-100/guest.conf"],
    ["a climbing name", "/store/100/qemu-100/...qcow2"],
    ["itself", "/store/100/qemu-200/drive-scsi0.qcow2"],
    ["a missing one", "/store/100/qemu-300/drive-scsi0.qcow2"],
    ["a JSON pseudo protocol", 'json:{"driver":"nbd"}'],
  ])("refuse a header that names %s", async (_what, backing) => {
    await makeLegacy(lab, "qemu-200", { "drive-scsi0": legacyImageBytes(size, backing) });
    await expect(resolve("100/qemu-200")).rejects.toThrow(PointDamagedError);
  });

  it("refuse a cycle of two and a linked folder", async () => {
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": legacyImageBytes(size, "/s/100/qemu-200/drive-scsi0.qcow2") });
    await makeLegacy(lab, "qemu-200", { "drive-scsi0": legacyImageBytes(size, "/s/100/qemu-100/drive-scsi0.qcow2") });
    await expect(resolve("100/qemu-200")).rejects.toThrow(/its own base/);
    await rm(disk("qemu-200"));
    await writeFile(disk("qemu-200"), legacyImageBytes(size, "/s/100/qemu-100/drive-scsi0.qcow2"));
    await writeFile(disk("qemu-100"), legacyImageBytes(size));
    expect((await resolve("100/qemu-200")).folders).toEqual(["qemu-200", "qemu-100"]);
    await rename(join(lab.path, "100/qemu-100"), join(lab.root, "moved"));
    await symlink(join(lab.root, "moved"), join(lab.path, "100/qemu-100"));
    await expect(resolve("100/qemu-200")).rejects.toThrow(PointDamagedError);
  });

  it("refuse an image that is cut short, at the top and below", async () => {
    const base = legacyImageBytes(size);
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": base });
    await makeLegacy(lab, "qemu-200", { "drive-scsi0": legacyImageBytes(size, "/s/100/qemu-100/drive-scsi0.qcow2") });
    expect((await checked("100/qemu-200")).paths).toHaveLength(2);
    for (const length of [3 * 65536, 65536]) {
      await truncate(disk("qemu-100"), length);
      for (const archive of ["100/qemu-100", "100/qemu-200"]) {
        await expect(checked(archive)).rejects.toThrow(PointDamagedError);
      }
      await writeFile(disk("qemu-100"), base);
    }
  });

  it("refuse an image that leaks, and one whose refcounts are too low", async () => {
    const image = legacyImageBytes(size);
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": image });
    expect((await checked("100/qemu-100")).paths).toHaveLength(1);
    image.writeUInt16BE(1, 131072 + 8); // the cluster behind the file's four: written, and no table leads to it
    await writeFile(disk("qemu-100"), Buffer.concat([image, Buffer.alloc(65536)]));
    await expect(checked("100/qemu-100")).rejects.toThrow(/damaged: 1 clusters belong to no table/);
    image.writeUInt16BE(0, 131072 + 6); // the L1 table
    await writeFile(disk("qemu-100"), image);
    await expect(checked("100/qemu-100")).rejects.toThrow(/damaged: host cluster 3 has refcount 0/);
  });

  it("refuse internal snapshots with the reason", async (context) => {
    requireTool(context, "qemu-img");
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": Buffer.alloc(0) });
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", disk("qemu-100"), String(size)]);
    execFileSync("qemu-img", ["snapshot", "-c", "before", disk("qemu-100")]);
    await expect(checked("100/qemu-100")).rejects.toThrow(UnsupportedError);
    await expect(checked("100/qemu-100")).rejects.toThrow(/it holds internal snapshots or bitmaps/);
  });

  it("refuse a base that this software wrote", async () => {
    const base = await backup(store, { epoch: 100 });
    await rm(join(base.path, "manifest.json"));
    await makeLegacy(lab, "qemu-200", {
      "drive-scsi0": legacyImageBytes(64 * MIB, "/s/100/qemu-100/drive-scsi0.qcow2"),
    });
    await expect(resolve("100/qemu-200")).rejects.toThrow(/this software wrote it/);
  });
});
