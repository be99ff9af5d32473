// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import {
  copyFile,
  cp,
  mkdir,
  open,
  readdir,
  readFile,
  rename,
  rm,
  symlink,
  truncate,
  utimes,
  writeFile,
} from "node:fs/promises";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { readProcess } from "../../../src/host/index.ts";
import { BaseUnusableError } from "../../../src/store/errors.ts";
import type { Point, Store } from "../../../src/store/index.ts";
import {
  backup,
  createLab,
  decide,
  editJson,
  type Lab,
  legacyImageBytes,
  MIB,
  makeLegacy,
  NEVER,
  readJson,
  VMGENID,
} from "./lab.ts";

const OTHER_VMGENID = "99999999-2222-3333-4444-555555555555";
const NO_VMGENID = { vmgenid: null } as const;

describe("findBase()", () => {
  let lab: Lab;
  let store: Store;
  beforeEach(async () => {
    lab = await createLab();
    store = await lab.open();
  });
  afterEach(async () => await lab[Symbol.asyncDispose]());

  it("takes no base for the first backup", async () => {
    expect(await decide(store)).toBe("first backup");
  });

  it("builds on the last backup when both witnesses agree", async () => {
    await backup(store, { epoch: 1000 });
    expect(await decide(store)).toBe("use 100/qemu-1000");
  });

  it("builds on incrementals as on fulls", async () => {
    const full = await backup(store, { epoch: 1000 });
    await backup(store, { epoch: 2000, base: full });
    expect(await decide(store)).toBe("use 100/qemu-2000");
  });

  it("decides by commit sequence when the clock jumped back", async () => {
    await backup(store, { epoch: 5000 });
    await backup(store, { epoch: 3000 });
    expect(await decide(store)).toBe("use 100/qemu-3000");
  });

  it("refuses a device that the last backup does not hold, or holds with another size", async () => {
    await backup(store, { epoch: 1000 });
    expect(await decide(store, { device: "drive-scsi1" })).toBe("it is not part of the last backup");
    expect(await decide(store, { sizeBytes: 128 * MIB })).toBe("size changed from 64.0 MiB to 128 MiB");
    expect(await decide(store, { sizeBytes: 64 * MIB + 512 })).toBe("size changed from 64.0 MiB to 67109376 B");
  });

  it("decides per device, not per guest", async () => {
    await backup(store, { epoch: 1000, devices: { "drive-scsi0": 64 * MIB, "drive-scsi1": 32 * MIB } });
    expect(await decide(store, { sizeBytes: 65 * MIB })).toMatch(/^size changed/);
    expect(await decide(store, { device: "drive-scsi1", sizeBytes: 32 * MIB })).toBe("use 100/qemu-1000");
  });

  describe("first witness: the record outside the store", () => {
    it("notices a rotated disk that holds an older state of the same store", async () => {
      await backup(store, { epoch: 1000 });
      await cp(lab.path, `${lab.path}.rotated`, { recursive: true });
      await backup(store, { epoch: 2000 });
      await rename(lab.path, `${lab.path}.first`);
      await rename(`${lab.path}.rotated`, lab.path);
      expect(await decide(await lab.open())).toBe("the last backup through this storage is not here");
    });

    it("notices an empty disk at the path", async () => {
      await backup(store, { epoch: 1000 });
      await rm(join(lab.path, "100"), { recursive: true });
      expect(await decide(store)).toBe("the last backup through this storage is not here");
    });

    it("notices a store without a record, as after moving the share to another cluster", async () => {
      await backup(store, { epoch: 1000 });
      await rm(lab.witnessPath(100));
      expect(await decide(store)).toMatch(/no record here/);
    });

    it("notices the point of another cluster that uses the same storage id", async () => {
      await using foreign = await createLab();
      const mine = await backup(store, { epoch: 1000 });
      await backup(await foreign.open({ path: lab.path }), { epoch: 2000 });
      expect(mine.sequence).toBe(1);
      expect(await decide(store)).toBe("qemu-2000 was made through this storage since, and is not recorded here");
    });

    it("does not trust one of two points with the same sequence", async () => {
      await backup(store, { epoch: 1000 });
      await cp(join(lab.path, "100/qemu-1000"), join(lab.path, "100/qemu-1500"), { recursive: true });
      await editJson(join(lab.path, "100/qemu-1500/manifest.json"), (manifest) => {
        manifest.uuid = "77777777-2222-3333-4444-555555555555";
        manifest.epoch = 1500;
      });
      expect(await decide(store)).toBe("qemu-1500 was made through this storage since, and is not recorded here");
    });

    it("is not disturbed by backups through another storage id on the same path", async () => {
      await backup(store, { epoch: 1000 });
      await backup(await lab.open({ storeid: "other" }), { epoch: 2000 });
      expect(await decide(store)).toBe("use 100/qemu-1000");
      expect(await decide(await lab.open({ storeid: "other" }))).toBe("use 100/qemu-2000");
    });

    it("does not fall back to an older point when the newest was deleted", async () => {
      const full = await backup(store, { epoch: 1000 });
      await backup(store, { epoch: 2000, base: full });
      await rm(join(lab.path, "100/qemu-2000"), { recursive: true });
      expect(await decide(store)).toBe("the last backup through this storage is not here");
    });

    it("does not trust a commit of which nobody knows how it ended", async () => {
      await backup(store, { epoch: 1000 });
      await editJson(lab.witnessPath(100), (record) => {
        record.inFlight = "77777777-2222-3333-4444-555555555555";
      });
      expect(await decide(store)).toBe("the last backup was interrupted during its commit");
    });

    it("makes a full backup when the record is damaged or of another guest", async () => {
      await backup(store, { epoch: 1000 });
      const good = await readFile(lab.witnessPath(100));
      await writeFile(lab.witnessPath(100), good.subarray(0, 40));
      expect(await decide(store)).toMatch(/record of the last backup is damaged/);
      await writeFile(lab.witnessPath(100), good);
      await editJson(lab.witnessPath(100), (record) => {
        record.vmid = 101;
      });
      expect(await decide(store)).toMatch(/belongs to another guest/);
    });

    it("is kept in /var/lib where there is no cluster", async () => {
      await using local = await createLab(false);
      const single = await local.open();
      await backup(single, { epoch: 1000 });
      expect((await readJson(local.witnessPath(100))).settled).toMatch(/^[0-9a-f-]{36}$/);
      expect(await decide(single)).toBe("use 100/qemu-1000");
    });
  });

  describe("second witness: the guest", () => {
    it("notices a rollback by the changed vmgenid", async () => {
      await backup(store, { epoch: 1000 });
      expect(await decide(store, { guest: { vmgenid: OTHER_VMGENID } })).toBe("vmgenid changed (rollback)");
    });

    it("notices that a vmgenid came or went", async () => {
      await backup(store, { epoch: 1000 });
      expect(await decide(store, { guest: {} })).toBe("vmgenid is gone");
      await backup(store, { epoch: 2000, ...NO_VMGENID });
      expect(await decide(store)).toBe("vmgenid appeared");
    });

    it("asks for the same QEMU process where there is no vmgenid", async () => {
      const process_ = await readProcess(process.pid);
      if (process_ === undefined) throw new Error("no /proc");
      await backup(store, { epoch: 1000, ...NO_VMGENID, process: process_ });
      expect(await decide(store, { guest: { process: process_ } })).toBe("use 100/qemu-1000");
      for (const other of [
        { ...process_, pid: process_.pid + 1 },
        { ...process_, startTime: "1" },
        { ...process_, bootId: OTHER_VMGENID },
      ]) {
        expect(await decide(store, { guest: { process: other } })).toBe("no vmgenid and QEMU was restarted");
      }
      expect(await decide(store, { guest: {} })).toBe("no vmgenid, and the QEMU process is not known");
    });

    it("does not take an unrecorded process for the same", async () => {
      await backup(store, { epoch: 1000, ...NO_VMGENID });
      expect(await decide(store, { guest: {} })).toMatch(/process is not known/);
    });

    it("compares with the record outside the store too", async () => {
      await backup(store, { epoch: 1000 });
      await editJson(lab.witnessPath(100), (record) => {
        record.guest = { vmgenid: OTHER_VMGENID };
      });
      expect(await decide(store)).toBe("vmgenid changed (rollback)");
    });
  });

  describe("folders of others", () => {
    it("notices a legacy folder that appeared, however old its name says it is", async () => {
      await backup(store, { epoch: 1000 });
      await makeLegacy(lab, "qemu-500", { "drive-scsi0": legacyImageBytes(64 * MIB) });
      expect(await decide(store)).toBe("an unknown directory qemu-500 appeared");
    });

    it("notices a damaged folder that appeared, also a link and a file", async () => {
      await backup(store, { epoch: 1000 });
      await mkdir(join(lab.path, "100/qemu-1500"));
      expect(await decide(store)).toBe("directory qemu-1500 is damaged: it has no manifest");
      await rm(join(lab.path, "100/qemu-1500"), { recursive: true });
      await symlink("qemu-1000", join(lab.path, "100/qemu-1500"));
      expect(await decide(store)).toBe("directory qemu-1500 is damaged: it is a symbolic link, not a directory");
    });

    it("knows the folders that were there at the last commit", async () => {
      await makeLegacy(lab, "qemu-500", { "drive-scsi0": legacyImageBytes(64 * MIB) });
      await mkdir(join(lab.path, "100/qemu-600"));
      await backup(store, { epoch: 1000 });
      expect(await decide(store)).toBe("use 100/qemu-1000");
    });
  });

  describe("the base itself", () => {
    const disk = () => join(lab.path, "100/qemu-1000/drive-scsi0.qcow2");
    let full: Point;
    beforeEach(async () => {
      full = await backup(store, { epoch: 1000 });
      await backup(store, { epoch: 2000, base: full });
      expect(await decide(store)).toBe("use 100/qemu-2000");
    });

    it("must have every file of its chain", async () => {
      await rm(disk());
      expect(await decide(store)).toMatch(/^base damaged: .*qemu-1000.*missing/);
    });

    it("must have files of the recorded size", async () => {
      await truncate(disk(), 65536);
      expect(await decide(store)).toMatch(/^base damaged: .*65536 bytes, expected 262144/);
    });

    it("must have the recorded headers", async () => {
      await using handle = await open(disk(), "r+");
      await handle.write(Buffer.from([1]), 0, 1, 47); // last byte of l1_table_offset's low half
      expect(await decide(store)).toMatch(/^base damaged: .*/);
    });

    it("must have the recorded headers, to the last byte", async () => {
      await using handle = await open(disk(), "r+");
      await handle.write(Buffer.from([1]), 0, 1, 60_000); // a byte no field lives in
      expect(await decide(store)).toMatch(/^base damaged: .*header checksum mismatch \(sha256\)/);
    });

    it("must not have been replaced by another backup of the same name", async () => {
      await editJson(join(lab.path, "100/qemu-1000/manifest.json"), (manifest) => {
        manifest.uuid = "77777777-2222-3333-4444-555555555555";
      });
      expect(await decide(store)).toMatch(/^base damaged: .*another backup/);
    });
  });

  it("survives a manifest that is a folder or a pipe", async () => {
    await backup(store, { epoch: 1000 });
    await mkdir(join(lab.path, "100/qemu-900/manifest.json"), { recursive: true });
    expect(await decide(store)).toBe("directory qemu-900 is damaged: it is a directory, not a file");
    await rm(join(lab.path, "100/qemu-900/manifest.json"), { recursive: true });
    execFileSync("mkfifo", [join(lab.path, "100/qemu-900/manifest.json")]);
    expect(await decide(store)).toBe("directory qemu-900 is damaged: it is a named pipe, not a file");
  });
});

describe("Base", () => {
  const guest = { vmgenid: VMGENID };
  const found = async (store: Store) => {
    const devices = new Map([["drive-scsi0", { size: 64 * MIB }]]);
    const { base } = await store.findBase({ vmid: 100, devices, guest, signal: NEVER }, async () => undefined);
    if (base === undefined) throw new Error("no base");
    return base;
  };
  /** What recheck() says after something happened. */
  const afterwards = async (happens: (lab: Lab, store: Store) => Promise<void>): Promise<unknown> => {
    await using lab = await createLab();
    const store = await lab.open();
    await backup(store, { epoch: 1000 });
    await using base = await found(store);
    await base.recheck(guest, NEVER);
    await happens(lab, store);
    return await base.recheck(guest, NEVER).catch((thrown: unknown) => thrown);
  };
  const image = "100/qemu-1000/drive-scsi0.qcow2";

  it.each<[string, (lab: Lab, store: Store) => Promise<void>, RegExp]>([
    ["its image is gone", (lab) => rm(join(lab.path, image)), /drive-scsi0.qcow2": it is missing/],
    [
      "another file has the name of its image",
      (lab) =>
        copyFile(join(lab.path, image), join(lab.path, "copy")).then(() =>
          rename(join(lab.path, "copy"), join(lab.path, image)),
        ),
      /another file took its place/,
    ],
    ["its image was written to", (lab) => utimes(join(lab.path, image), 1, 1), /it was changed while it was in use/],
    [
      "its manifest was replaced",
      async (lab) => {
        const path = join(lab.path, "100/qemu-1000/manifest.json");
        const bytes = await readFile(path);
        await rm(path);
        await writeFile(path, bytes);
      },
      /it was removed or replaced while it was in use/,
    ],
    [
      "a newer backup took its place",
      async (_lab, store) => void (await backup(store, { epoch: 2000 })),
      /a newer backup took its place/,
    ],
    ["the witness is gone", (lab) => rm(lab.witnessPath(100)), /no record here/],
    ["state.json is gone", (lab) => rm(join(lab.path, "100/state.json")), /state.json is missing/],
    ["an unknown directory appeared", (lab) => mkdir(join(lab.path, "100/qemu-3000")), /qemu-3000 is damaged/],
    [
      "its lock was taken",
      async (lab) => {
        for (const name of await readdir(join(lab.path, "100/.locks"))) await rm(join(lab.path, "100/.locks", name));
      },
      /its lock file is gone/,
    ],
  ])("is refused at the moment of use if %s", async (_what, happens, reason) => {
    const error = await afterwards(happens);
    expect(error).toBeInstanceOf(BaseUnusableError);
    expect(String(error)).toMatch(reason);
  });

  it("is refused for a guest that is another one by then", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    await backup(store, { epoch: 1000 });
    await using base = await found(store);
    await expect(base.recheck({ vmgenid: VMGENID.replace("1", "2") }, NEVER)).rejects.toThrow(/vmgenid changed/);
  });
});
