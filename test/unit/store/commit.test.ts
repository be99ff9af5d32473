// SPDX-License-Identifier: AGPL-3.0-or-later
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rm, stat, symlink, truncate, utimes, writeFile } from "node:fs/promises";
import { join, relative } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { EnvironmentError } from "../../../src/core/index.ts";
import { Folder } from "../../../src/host/index.ts";
import { type DurableIo, durableIo } from "../../../src/store/durable.ts";
import { BaseUnusableError, LockedError, PointExistsError } from "../../../src/store/errors.ts";
import type { Store } from "../../../src/store/index.ts";
import {
  backup,
  createLab,
  decide,
  fillStaged,
  holdBase,
  type Lab,
  MIB,
  NEVER,
  readJson,
  resolveChain,
} from "./lab.ts";

/** What an act is about: a folder, a name in one, or the path of an open file. */
function pathOf([where, name]: readonly unknown[]): string {
  if (!(where instanceof Folder)) return String(name);
  return typeof name === "string" ? where.pathOf(name) : where.path;
}

/** Records every durable act as "<act> <name>", and fails the one that `failAt` picks. */
function spyIo(lab: Lab, failAt: (act: string) => boolean = () => false): { io: DurableIo; acts: string[] } {
  const acts: string[] = [];
  const name = (path: string): string =>
    path.startsWith(lab.root)
      ? "witness"
      : relative(join(lab.path, "100"), path).replace(/\.staging-[0-9a-f-]{36}/, "STAGING") || ".";
  const wrap =
    (kind: string, act: (...args: never[]) => Promise<void>) =>
    async (...args: unknown[]): Promise<void> => {
      const label = `${kind} ${name(pathOf(args))}`;
      acts.push(label);
      if (failAt(label)) throw new EnvironmentError(`Cannot ${kind}: injected`, { errno: "EIO" });
      await act.apply(durableIo, args as never[]);
    };
  const io: DurableIo = {
    replaceFile: wrap("replace", durableIo.replaceFile),
    syncFile: wrap("sync", durableIo.syncFile),
    syncFolder: wrap("syncfolder", durableIo.syncFolder),
    rename: wrap("rename", durableIo.rename),
  };
  return { io, acts };
}

/** The acts of a commit, in the order that makes it safe. */
const ACTS_OF_A_COMMIT = [
  "sync STAGING/guest.conf",
  "sync STAGING/drive-scsi0.qcow2",
  "sync STAGING/drive-scsi0.qcow2",
  "sync STAGING/guest.conf",
  "sync STAGING/manifest.json",
  "syncfolder STAGING",
  "replace witness", // in flight
  "rename STAGING",
  "syncfolder .",
  "syncfolder ..", // a new guest's folder
  "replace state.json",
  "replace witness", // settled
];

describe("StagedPoint.commit()", () => {
  let lab: Lab;
  beforeEach(async () => {
    lab = await createLab();
  });
  afterEach(async () => await lab[Symbol.asyncDispose]());

  const listed = async (store: Store): Promise<string[]> =>
    (await store.listPoints({}, NEVER)).map((point) => point.archive);

  it("syncs files, manifest and folder before the witness, and renames before anything is settled", async () => {
    const { io, acts } = spyIo(lab);
    await backup(await lab.open({ io }), { epoch: 1000 });
    expect(acts).toEqual(ACTS_OF_A_COMMIT);
  });

  it("marks the witness in flight before the rename and settles it after", async () => {
    const seen: unknown[] = [];
    const io: DurableIo = {
      ...durableIo,
      rename: async (...args) => {
        seen.push(await readJson(lab.witnessPath(100)));
        await durableIo.rename(...args);
      },
    };
    const first = await backup(await lab.open(), { epoch: 1000 });
    const second = await backup(await lab.open({ io }), { epoch: 2000 });
    expect(seen).toEqual([expect.objectContaining({ settled: first.uuid, inFlight: second.uuid })]);
    const after = await readJson(lab.witnessPath(100));
    expect(after.settled).toBe(second.uuid);
    expect(after).not.toHaveProperty("inFlight");
  });

  const before = ACTS_OF_A_COMMIT.slice(0, 8).map((act, at) => ({ act, at }));
  it.each(before)("leaves nothing and the witness as it was when it fails at step $at: $act", async ({ at }) => {
    const plain = await lab.open();
    const base = await backup(plain, { epoch: 1000 });
    const witness = await readFile(lab.witnessPath(100));
    let step = 0;
    const { io } = spyIo(lab, () => step++ === at);
    await expect(backup(await lab.open({ io }), { epoch: 2000, base })).rejects.toThrow(/injected/);
    expect(await readdir(join(lab.path, "100"))).not.toContain("qemu-2000");
    expect((await readdir(join(lab.path, "100"))).filter((name) => name.startsWith(".staging"))).toEqual([]);
    expect(await readFile(lab.witnessPath(100))).toEqual(witness);
    expect(await decide(plain)).toBe("use 100/qemu-1000");
  });

  it("leaves no witness when the first backup ever fails at the rename", async () => {
    const { io } = spyIo(lab, (act) => act === "rename STAGING");
    await expect(backup(await lab.open({ io }), { epoch: 1000 })).rejects.toThrow(/injected/);
    expect(existsSync(lab.witnessPath(100))).toBe(false);
    expect(await decide(await lab.open())).toBe("first backup");
  });

  const after = ACTS_OF_A_COMMIT.slice(8).map((act, at) => ({ act, at: at + 8 }));
  it.each(after)("keeps the point when step $at fails after the rename: $act", async ({ at }) => {
    const plain = await lab.open();
    const base = await backup(plain, { epoch: 1000 });
    let step = 0;
    const { io } = spyIo(lab, () => step++ === at);
    const point = await backup(await lab.open({ io }), { epoch: 2000, base });
    expect(point.archive).toBe("100/qemu-2000");
    expect(await listed(plain)).toEqual(["100/qemu-1000", "100/qemu-2000"]);
    expect((await resolveChain(plain, point, "drive-scsi0", NEVER)).paths).toHaveLength(2);
    expect(lab.warnings.join()).toMatch(/The backup is complete, but/);
    expect(await decide(plain)).toBe("the last backup was interrupted during its commit");
  });

  it("takes a rename that was done although its reply was lost", async () => {
    const io: DurableIo = {
      ...durableIo,
      rename: async (from, name, to, newName) => {
        await from.rename(name, to, newName);
        throw new EnvironmentError("Cannot rename: no such file", { errno: "ENOENT" });
      },
    };
    const store = await lab.open({ io });
    await backup(store, { epoch: 1000 });
    expect(await decide(store)).toBe("use 100/qemu-1000");
  });

  it("gives ever higher sequence numbers, also when points or the state file are gone", async () => {
    const store = await lab.open();
    expect((await backup(store, { epoch: 1000 })).sequence).toBe(1);
    expect((await backup(store, { epoch: 2000 })).sequence).toBe(2);
    await rm(join(lab.path, "100/qemu-2000"), { recursive: true });
    expect((await backup(store, { epoch: 3000 })).sequence).toBe(3);
    await rm(join(lab.path, "100/state.json"));
    expect((await backup(store, { epoch: 4000 })).sequence).toBe(4);
    await writeFile(join(lab.path, "100/state.json"), '{"sequence": "');
    expect((await backup(store, { epoch: 5000 })).sequence).toBe(5);
  });

  it("records sizes, digests and the header of what lies in the folder", async () => {
    const point = await backup(await lab.open(), { epoch: 1000 });
    const bytes = await readFile(join(point.path, "drive-scsi0.qcow2"));
    const manifest = await readJson(join(point.path, "manifest.json"));
    expect(manifest.files).toContainEqual({
      name: "drive-scsi0.qcow2",
      sizeBytes: bytes.length,
      digest: { algorithm: "sha256", value: createHash("sha256").update(bytes).digest("hex") },
    });
    expect(manifest.devices).toEqual([
      expect.objectContaining({
        name: "drive-scsi0",
        mode: "full",
        virtualBytes: 64 * MIB,
        headerSha256: createHash("sha256").update(bytes.subarray(0, 65536)).digest("hex"),
      }),
    ]);
    expect(manifest).toMatchObject({ version: 1, vmid: 100, type: "qemu", epoch: 1000, sequence: 1, storeid: "bk" });
  });

  it("digests the configs with what every system has", async () => {
    const point = await backup(await lab.open(), { epoch: 1000 });
    const bytes = await readFile(join(point.path, "guest.conf"));
    const value = createHash("sha256").update(bytes).digest("hex");
    const { files } = await readJson(join(point.path, "manifest.json"));
    const digest = { algorithm: "sha256", value };
    expect(files).toContainEqual({ name: "guest.conf", sizeBytes: bytes.length, digest });
  });

  it("cuts a reason that is longer than a manifest takes", async () => {
    const store = await lab.open();
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 1000 });
    const reason = `first line\n${"x".repeat(5000)}`;
    const point = await staged.commit({ devices: devices.map((device) => ({ ...device, reason })) }, NEVER);
    const recorded = (await store.openPoint(point.archive, NEVER)).manifest?.devices[0]?.reason;
    expect(recorded).toMatch(/^first line x+\.\.\.$/);
    expect(recorded).toHaveLength(1000);
  });

  it("makes folders and files private whatever the umask is", async () => {
    const umask = process.umask(0);
    try {
      const point = await backup(await lab.open(), { epoch: 1000 });
      const paths = ["", "guest.conf", "drive-scsi0.qcow2", "manifest.json"].map((name) => join(point.path, name));
      for (const path of [...paths, join(lab.path, "100"), join(lab.path, "100/state.json"), lab.witnessPath(100)]) {
        expect([path, (await stat(path)).mode & 0o077]).toEqual([path, 0]);
      }
    } finally {
      process.umask(umask);
    }
  });

  it("refuses a file that is shorter than what was written", async () => {
    const store = await lab.open();
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 1000 });
    await truncate(staged.pathOf("drive-scsi0.qcow2"), 131072);
    await expect(staged.commit({ devices }, NEVER)).rejects.toThrow(/has 131072 bytes, 262144 were written/);
  });

  it("refuses an image that does not say what the job says", async () => {
    const store = await lab.open();
    const base = await backup(store, { epoch: 500 });
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    const [device] = await fillStaged(staged, { epoch: 1000 });
    if (device === undefined) throw new Error("no device");
    const wrongSize = { ...device, virtualBytes: 65 * MIB };
    await expect(staged.commit({ devices: [wrongSize] }, NEVER)).rejects.toThrow(/its virtual size is 67108864/);
    const increment = { ...device, isIncremental: true };
    await expect(staged.commit({ devices: [increment] }, NEVER)).rejects.toThrow(/the job holds no base of it/);
    await using held = await holdBase(store, base);
    await expect(staged.commit({ devices: [increment], base: held }, NEVER)).rejects.toThrow(/no backing file/);
  });

  it("refuses links and folders among the files, and a missing guest config", async () => {
    const store = await lab.open();
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    await expect(staged.commit({ devices: [] }, NEVER)).rejects.toThrow(/guest\.conf/);
    await symlink("/etc/hostname", staged.pathOf("link"));
    await expect(staged.commit({ devices: [] }, NEVER)).rejects.toThrow(/this backup did not write it/);
    await rm(staged.pathOf("link"));
    await mkdir(staged.pathOf("folder"));
    await expect(staged.commit({ devices: [] }, NEVER)).rejects.toThrow(/this backup did not write it/);
  });

  it("dies if the base went while the job ran", async () => {
    const store = await lab.open();
    const base = await backup(store, { epoch: 1000 });
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 2000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 2000, base });
    await using held = await holdBase(store, base);
    await rm(join(base.path, "drive-scsi0.qcow2"));
    await expect(staged.commit({ devices, base: held }, NEVER)).rejects.toThrow(BaseUnusableError);
  });

  it("dies if its lock was taken over, and leaves the witness alone", async () => {
    const store = await lab.open();
    await backup(store, { epoch: 1000 });
    const witness = await readFile(lab.witnessPath(100));
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 2000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 2000 });
    await rm(join(lab.path, "100/.lock"));
    await using _other = await store.lockGuest(100, NEVER);
    await expect(staged.commit({ devices }, NEVER)).rejects.toThrow(LockedError);
    expect(await readFile(lab.witnessPath(100))).toEqual(witness);
  });

  it("dies if something took the name while the job ran, be it an empty folder", async () => {
    const store = await lab.open();
    await backup(store, { epoch: 1000 });
    const witness = await readFile(lab.witnessPath(100));
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 2000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 2000 });
    await mkdir(join(lab.path, "100/qemu-2000"));
    await expect(staged.commit({ devices }, NEVER)).rejects.toThrow(PointExistsError);
    expect(await readdir(join(lab.path, "100/qemu-2000"))).toEqual([]);
    expect(await readFile(lab.witnessPath(100))).toEqual(witness);
  });

  it("stops at an aborted signal before anything is visible", async () => {
    const store = await lab.open();
    const controller = new AbortController();
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 2000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 2000 });
    controller.abort(new Error("cancelled"));
    await expect(staged.commit({ devices }, controller.signal)).rejects.toThrow("cancelled");
    expect(await listed(store)).toEqual([]);
  });
});

describe("Store.beginPoint()", () => {
  it("refuses a second backup of the same second, also where the other is damaged", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    await backup(store, { epoch: 1000 });
    await expect(backup(store, { epoch: 1000 })).rejects.toThrow(PointExistsError);
    await mkdir(join(lab.path, "100/qemu-2000"));
    await expect(backup(store, { epoch: 2000 })).rejects.toThrow(/a backup with this timestamp already exists/);
  });

  it("refuses a taken name before anything is written", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    await backup(store, { epoch: 1000 });
    await using lock = await store.lockGuest(100, NEVER);
    await expect(store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER })).rejects.toThrow(
      PointExistsError,
    );
  });

  it("refuses names that are no plain file names", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1, signal: NEVER });
    for (const name of ["..", ".", "", "a/b", "a\0b", "../x", ".hidden", "a b", "x".repeat(300)]) {
      expect(() => staged.pathOf(name)).toThrow(/Cannot use file name/);
    }
  });

  it("hides the staging folder until commit and removes it without one", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    {
      await using lock = await store.lockGuest(100, NEVER);
      await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
      await fillStaged(staged, { epoch: 1000 });
      expect(await store.listPoints({}, NEVER)).toEqual([]);
      expect(lab.warnings).toEqual([]);
    }
    expect(await readdir(join(lab.path, "100"))).toEqual([]);
  });

  it("sweeps what a killed job left, and nothing else", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const base = await backup(store, { epoch: 1000 });
    const folder = join(lab.path, "100");
    await mkdir(join(folder, ".staging-11111111-2222-3333-4444-555555555555/deep"), { recursive: true });
    await mkdir(join(folder, ".trash-qemu-500"));
    await writeFile(join(folder, ".tmp-old"), "");
    await writeFile(join(base.path, ".tmp-old"), "");
    await writeFile(join(folder, ".tmp-young"), "");
    await writeFile(join(folder, "notes-of-the-admin.txt"), "mine");
    for (const path of [join(folder, ".tmp-old"), join(base.path, ".tmp-old")]) await utimes(path, 1, 1);
    await backup(store, { epoch: 2000, base });
    expect((await readdir(folder)).sort()).toEqual(
      [".locks", ".tmp-young", "notes-of-the-admin.txt", "qemu-1000", "qemu-2000", "state.json"].sort(),
    );
    expect(await readdir(base.path)).not.toContain(".tmp-old");
  });

  it("does not sweep without the lock", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    const lock = await store.lockGuest(100, NEVER);
    await lock[Symbol.asyncDispose]();
    const leftover = join(lab.path, "100/.staging-11111111-2222-3333-4444-555555555555");
    await mkdir(leftover);
    await expect(store.beginPoint({ lock, type: "qemu", epoch: 1, signal: NEVER })).rejects.toThrow(LockedError);
    expect(existsSync(leftover)).toBe(true);
  });
});
