// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { mkdir, readFile, rename, rm, stat, symlink, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { NotFoundError, RequestError } from "../../../src/core/index.ts";
import { Qcow2Writer } from "../../../src/qcow2/index.ts";
import { StoreUnavailableError } from "../../../src/store/errors.ts";
import { PointDamagedError, type Store } from "../../../src/store/index.ts";
import { newFileAt } from "../../support/qcow2/open-images.ts";
import { backup, createLab, decide, editJson, type Lab, legacyImageBytes, MIB, makeLegacy, NEVER } from "./lab.ts";

let lab: Lab;
let store: Store;
beforeEach(async () => {
  lab = await createLab();
  store = await lab.open();
});
afterEach(async () => await lab[Symbol.asyncDispose]());

const listed = async (vmid?: number): Promise<string[]> =>
  (await store.listPoints({ vmid }, NEVER)).map((point) => point.archive);

describe("Store.open()", () => {
  it("says in one sentence that the path is missing, or is no folder", async () => {
    await writeFile(join(lab.path, "file"), "");
    const missing = await lab.open({ path: join(lab.path, "missing") }).catch((thrown: unknown) => thrown);
    expect(missing).toBeInstanceOf(StoreUnavailableError);
    expect(String(missing)).toMatch(/Cannot use storage path ".*missing": no such file or directory \(ENOENT\)$/);
    await expect(lab.open({ path: join(lab.path, "file") })).rejects.toThrow(/it is not a directory/);
    await expect(lab.open({ path: join(lab.path, "file/below") })).rejects.toThrow(StoreUnavailableError);
    await expect(lab.open({ path: "relative" })).rejects.toThrow(RequestError);
    await expect(lab.open({ storeid: "../x" })).rejects.toThrow(RequestError);
  });
});

describe("Store.listPoints()", () => {
  it("lists one guest or all, with base, size and attributes", async () => {
    const full = await backup(store, { epoch: 1000 });
    await backup(store, { epoch: 2000, base: full });
    await backup(store, { vmid: 200, epoch: 1000 });
    await store.updateAttributes("100/qemu-1000", { notes: "before the upgrade\nä", protected: true }, NEVER);
    expect(await listed()).toEqual(["100/qemu-1000", "100/qemu-2000", "200/qemu-1000"]);
    expect(await listed(200)).toEqual(["200/qemu-1000"]);
    expect(await listed(300)).toEqual([]);
    const [first, second] = await store.listPoints({ vmid: 100 }, NEVER);
    expect(first).toMatchObject({
      notes: "before the upgrade\nä",
      protected: true,
      parent: undefined,
      kind: "complete",
    });
    expect(second).toMatchObject({
      volname: "backup/100/qemu-2000",
      protected: false,
      parent: "backup/100/qemu-1000",
      sequence: 2,
    });
    expect(second?.notes).toBeUndefined();
  });

  it("counts what the files occupy, as du does, and never 0", async () => {
    const point = await backup(store, { epoch: 1000 });
    execFileSync("truncate", ["-s", "10M", join(point.path, "backup.log")]); // sparse
    const files = ["guest.conf", "drive-scsi0.qcow2", "manifest.json", "backup.log"].map((f) => join(point.path, f));
    const output = execFileSync("du", ["-B1", ...files], { encoding: "utf8" });
    const expected = output.split("\n").reduce((sum, line) => sum + Number(line.split("\t")[0] ?? 0), 0);
    expect((await store.listPoints({}, NEVER))[0]?.occupiedBytes).toBe(expected);
    expect(expected).toBeLessThan(MIB);
  });

  it("leaves out and warns of what is damaged, and lists the rest", async () => {
    for (const epoch of [1000, 2000, 3000, 4000, 5000]) await backup(store, { epoch });
    const at = (path: string) => join(lab.path, "100", path);
    await rm(at("qemu-1000/manifest.json"));
    await rm(at("qemu-2000/drive-scsi0.qcow2"));
    await writeFile(at("qemu-3000/guest.conf"), "longer than before, much longer than it was before, really");
    await editJson(at("qemu-4000/manifest.json"), (manifest) => {
      manifest.version = 2;
    });
    await mkdir(at("qemu-6000"));
    await symlink("qemu-5000", at("qemu-7000"));
    await writeFile(at("qemu-8000"), "");
    expect(await listed()).toEqual(["100/qemu-5000"]);
    const text = lab.warnings.join("\n");
    expect(text).toMatch(/100\/qemu-1000": it has no manifest/);
    expect(text).toMatch(/100\/qemu-2000": its file drive-scsi0.qcow2 is missing/);
    expect(text).toMatch(/100\/qemu-3000": its file guest.conf has \d+ bytes, expected \d+/);
    expect(text).toMatch(
      /100\/qemu-4000": manifest.json was written by a newer version \(format 2, this version reads up to 1\)/,
    );
    for (const name of ["qemu-6000", "qemu-7000", "qemu-8000"]) expect(text).toContain(name);
  });

  it("refuses a point that was copied to another name or guest", async () => {
    const point = await backup(store, { epoch: 1000 });
    await rename(point.path, join(lab.path, "100/qemu-1001"));
    await expect(store.openPoint("100/qemu-1001", NEVER)).rejects.toThrow(/manifest is of another point/);
  });

  it("ignores what is not named like a guest or a point", async () => {
    await backup(store, { epoch: 1000 });
    for (const name of ["lost+found", "99", "0100", "abc", "100/other", "100/qemu-", "100/qemu-01", "100/QEMU-5"]) {
      await mkdir(join(lab.path, name));
    }
    await writeFile(join(lab.path, "300"), "a file");
    await symlink("100", join(lab.path, "400"));
    expect(await listed()).toEqual(["100/qemu-1000"]);
  });

  it("tells an unreachable store from an empty one", async () => {
    expect(await listed()).toEqual([]);
    await rename(lab.path, `${lab.path}.gone`);
    await expect(listed()).rejects.toThrow(StoreUnavailableError);
    await expect(listed(100)).rejects.toThrow(StoreUnavailableError);
    await expect(store.openPoint("100/qemu-1000", NEVER)).rejects.toThrow(StoreUnavailableError);
    await expect(store.lockGuest(100, NEVER)).rejects.toThrow(StoreUnavailableError);
  });

  it("survives any JSON and any bytes in every file it reads", { timeout: 180_000 }, async () => {
    const good = await backup(store, { epoch: 1000 });
    const victim = await backup(store, { epoch: 2000, base: good });
    const manifest = await readFile(join(victim.path, "manifest.json"));
    const files = {
      manifest: join(victim.path, "manifest.json"),
      attributes: join(victim.path, "attributes.json"),
      state: join(lab.path, "100/state.json"),
      witness: lab.witnessPath(100),
    };
    const parsed = JSON.parse(manifest.toString()) as Record<string, unknown>;
    const mutated = fc
      .tuple(fc.constantFrom(...Object.keys(parsed)), fc.jsonValue())
      .map(([key, value]) => Buffer.from(JSON.stringify({ ...parsed, [key]: value })));
    const anything = fc.oneof(
      mutated,
      fc.json().map((text) => Buffer.from(text)),
      fc.uint8Array({ maxLength: 200 }).map((bytes) => Buffer.from(bytes)),
      fc.nat(manifest.length).map((length) => manifest.subarray(0, length)),
    );
    const check = async (name: keyof typeof files, bytes: Buffer): Promise<void> => {
      await writeFile(files[name], bytes);
      expect(await listed()).toContain("100/qemu-1000");
      expect(await decide(store)).toBeTypeOf("string");
    };
    await fc.assert(fc.asyncProperty(fc.constantFrom("manifest", "attributes", "state", "witness"), anything, check), {
      seed: 4711,
      numRuns: 150,
    });
    await writeFile(files.state, "[]");
    expect((await backup(store, { epoch: 3000 })).sequence).toBeGreaterThan(1);
  });
});

describe("Store.openPoint()", () => {
  it("opens by archive and by volume name and gives the configs byte for byte", async () => {
    await backup(store, { epoch: 1000 });
    const point = await store.openPoint("backup/100/qemu-1000", NEVER);
    expect(point.volname).toBe("backup/100/qemu-1000");
    const text = "memory: 512\nvmgenid: 11111111-2222-3333-4444-555555555555\n\xff\n";
    expect(await point.guestConfig()).toEqual(Buffer.from(text, "latin1"));
    expect(await point.firewallConfig()).toBeUndefined();
    expect(point.devices.get("drive-scsi0")).toMatchObject({ virtualBytes: 64 * MIB, mode: "full" });
  });

  it("notices a config that was changed without changing its size", async () => {
    const point = await backup(store, { epoch: 1000 });
    const path = join(point.path, "guest.conf");
    const bytes = await readFile(path);
    bytes[0] = 0x4d;
    await writeFile(path, bytes);
    await expect(point.guestConfig()).rejects.toThrow(/checksum mismatch \(sha256\)/);
  });

  it("keeps an empty firewall config apart from none", async () => {
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    await staged.writeFile("guest.conf", Buffer.from("memory: 1\n"));
    await staged.writeFile("firewall.conf", Buffer.alloc(0));
    await staged.commit({ devices: [] }, NEVER);
    expect(await (await store.openPoint("100/qemu-1000", NEVER)).firewallConfig()).toEqual(Buffer.alloc(0));
  });

  it("tells not found, damaged and impossible names apart", async () => {
    await mkdir(join(lab.path, "100/qemu-5"), { recursive: true });
    await expect(store.openPoint("100/qemu-1000", NEVER)).rejects.toThrow(NotFoundError);
    await expect(store.openPoint("100/qemu-5", NEVER)).rejects.toThrow(PointDamagedError);
    for (const name of [
      "",
      "100",
      "100/qemu-1/x",
      "../qemu-1",
      "100/../qemu-1",
      "100/qemu-1\n",
      "99/qemu-1",
      "100/kvm-1",
      "100/qemu-01",
      "100/qemu-1\0",
      "backup/backup/100/qemu-1",
      "x".repeat(5000),
    ]) {
      await expect(store.openPoint(name, NEVER)).rejects.toThrow(RequestError);
    }
  });
});

describe("legacy folders", () => {
  const image = legacyImageBytes(8 * MIB);

  it("are listed and opened when guest config and every mapped disk are there", async () => {
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": image, "drive-efidisk0": image });
    expect(await store.listPoints({}, NEVER)).toEqual([
      expect.objectContaining({ archive: "100/qemu-100", kind: "legacy", protected: false, sequence: undefined }),
    ]);
    const point = await store.openPoint("100/qemu-100", NEVER);
    expect([...point.devices.keys()]).toEqual(["drive-scsi0", "drive-efidisk0"]);
    expect((await point.guestConfig()).toString()).toMatch(/^memory: 512\n#qmdump#map:scsi0:drive-scsi0:/);
    expect((await point.firewallConfig())?.toString()).toBe("[OPTIONS]\n");
    expect(await decide(store)).toBe("first backup");
  });

  it("are damaged when a mapped disk, the config or its sense is missing", async () => {
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": image }, ["drive-scsi0", "drive-scsi1"]);
    const without = await makeLegacy(lab, "qemu-200", { "drive-scsi0": image });
    await rm(join(without, "guest.conf"));
    const evil = await makeLegacy(lab, "qemu-300", { "drive-scsi0": image });
    await writeFile(join(evil, "guest.conf"), "#qmdump#map:scsi0:../../etc/passwd:local:raw:\n");
    const empty = await makeLegacy(lab, "qemu-400", {});
    await writeFile(join(empty, "guest.conf"), "");
    const linked = await makeLegacy(lab, "qemu-500", { "drive-scsi0": image });
    await rename(join(linked, "drive-scsi0.qcow2"), join(linked, "real"));
    await symlink("real", join(linked, "drive-scsi0.qcow2"));
    expect(await listed()).toEqual([]);
    expect(lab.warnings).toHaveLength(5);
    expect(lab.warnings[0]).toMatch(/its disk drive-scsi1 is missing/);
  });

  it.each([
    ["none", undefined],
    ["zlib", undefined],
    ["none", "../qemu-50/drive-scsi0.qcow2"],
  ] as const)("are damaged when this software wrote a disk (%s, base %s), be it whole or not", async (kind, base) => {
    const folder = await makeLegacy(lab, "qemu-100", { "drive-scsi0": image });
    const path = join(folder, "drive-scsi0.qcow2");
    expect(await listed()).toEqual(["100/qemu-100"]);
    await rm(path);
    {
      const backing = base === undefined ? undefined : ({ file: base, format: "qcow2" } as const);
      const options = { file: newFileAt(path), virtualBytes: 8 * MIB, compression: kind, backing, signal: NEVER };
      await using writer = await Qcow2Writer.create(options);
      await writer.writeData(MIB, Buffer.alloc(MIB, "data"));
      await writer.finish();
    }
    for (const bytes of [(await stat(path)).size, 65536 * 2, 65536]) {
      await truncate(path, bytes);
      expect(await listed()).toEqual([]);
      expect(lab.warnings.at(-1)).toMatch(/no manifest, but its disk drive-scsi0 was written by this software/);
      await expect(store.openPoint("100/qemu-100", NEVER)).rejects.toThrow(PointDamagedError);
    }
  });

  it("are damaged when a disk names its base as this software does", async () => {
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": legacyImageBytes(8 * MIB, "../qemu-50/drive-scsi0.qcow2") });
    expect(await listed()).toEqual([]);
    expect(lab.warnings[0]).toMatch(/was written by this software/);
  });

  it("are damaged when the config has a disk that its map does not name: the map is its end", async () => {
    const folder = await makeLegacy(lab, "qemu-100", { "drive-scsi0": image });
    const map = "#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n";
    const disk = "local-lvm:vm-100-disk-1,size=8M";
    const lines: Array<[string, boolean]> = [
      ...["ide0", "sata5", "scsi30", "virtio15", "tpmstate0"].map((key): [string, boolean] => [
        `${key}: ${disk}`,
        false,
      ]),
      [`bios: ovmf\nefidisk0: ${disk}`, false],
      [`efidisk0: ${disk}`, true], // PVE leaves it out
      [`scsi1: ${disk},backup=0`, true],
      ["ide2: local:iso/debian.iso,media=cdrom,size=1M", true],
      ["ide2: none,media=cdrom", true],
      [`unused0: ${disk}`, true],
      [`[snap]\nscsi1: ${disk}`, true],
    ];
    for (const [line, isWhole] of lines) {
      await writeFile(join(folder, "guest.conf"), `scsi0: ${disk}\n${map}${line}\n`);
      expect([line, await listed()]).toEqual([line, isWhole ? ["100/qemu-100"] : []]);
    }
    await writeFile(join(folder, "guest.conf"), "memory: 512\n");
    expect(await listed()).toEqual([]);
    expect(lab.warnings.at(-1)).toMatch(/its guest config does not name its file "drive-scsi0.qcow2"/);
    await rm(join(folder, "drive-scsi0.qcow2"));
    expect(await listed()).toEqual(["100/qemu-100"]); // a guest without any disk
  });

  it("take notes and protection like all others", async () => {
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": image });
    await store.updateAttributes("100/qemu-100", { notes: "old", protected: true }, NEVER);
    expect(await store.readAttributes("100/qemu-100", NEVER)).toEqual({ notes: "old", protected: true });
  });
});
