// SPDX-License-Identifier: AGPL-3.0-or-later
// The lab must behave like PVE's QEMU, or every test on top of it proves nothing. nbdinfo and qemu-img judge.
import { mkdtemp, readFile, rm, stat } from "node:fs/promises";
import { connect } from "node:net";
import os from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  compareImages,
  compareRaw,
  LabControl,
  LabGuest,
  type LabGuestOptions,
  runTool,
  seededBytes,
} from "../../fixtures/lab/index.ts";
import { requireTool } from "../support/programs/tools.ts";

const MIB = 1024 * 1024;
const GRANULE = 4 * MIB;
const SIZE = 64 * MIB;
const BITMAP = "snapshot-access:store1";

let dir: string;
let guest: LabGuest;

async function startGuest(options: Partial<LabGuestOptions> = {}): Promise<LabGuest> {
  const disks = [{ device: "drive-scsi0", sizeBytes: SIZE }];
  guest = await LabGuest.start({ dir, vmid: 100, storeid: "store1", disks, ...options });
  return guest;
}

beforeEach(async (context) => {
  requireTool(context, "qemu-storage-daemon", "qemu-img", "nbdinfo", "setpriv");
  dir = await mkdtemp(path.join(os.tmpdir(), "lab-"));
});

afterEach(async () => {
  await guest?.[Symbol.asyncDispose]();
  await rm(dir, { recursive: true, force: true });
});

const uriOf = (socket: string, name: string): string => `nbd+unix:///${name}?socket=${socket}`;

/** Dirty ranges as [offset, length] in granules, by nbdinfo. */
async function dirtyGranules(socket: string, device = "drive-scsi0"): Promise<number[][]> {
  const map = await runTool("nbdinfo", ["--json", `--map=qemu:dirty-bitmap:${BITMAP}`, uriOf(socket, device)]);
  return (JSON.parse(map) as Array<{ offset: number; length: number; type: number }>)
    .filter(({ type }) => type === 1)
    .map(({ offset, length }) => [offset / GRANULE, length / GRANULE]);
}

async function fullThenUse(): Promise<void> {
  const full = await guest.openBackup({ modes: { "drive-scsi0": "new" } });
  await full.finish(true);
}

describe("LabGuest.openBackup()", () => {
  it("gives no bitmap in mode none", async () => {
    await startGuest();
    await using backup = await guest.openBackup();
    const volume = backup.volumes["drive-scsi0"];
    expect(volume).toEqual({ size: SIZE, "bitmap-mode": "none", "nbd-path": path.join(dir, "100-nbd.backup-access") });
    await expect(dirtyGranules(volume?.["nbd-path"] ?? "")).rejects.toThrow(/bitmap|context|map/i);
  });

  it("makes a new bitmap all dirty", async () => {
    await startGuest();
    await using backup = await guest.openBackup({ modes: { "drive-scsi0": "new" } });
    const volume = backup.volumes["drive-scsi0"];
    expect(volume).toMatchObject({ "bitmap-mode": "new", "bitmap-name": BITMAP });
    expect(await dirtyGranules(volume?.["nbd-path"] ?? "")).toEqual([[0, 16]]);
  });

  it("answers use with new where there is no bitmap", async () => {
    await startGuest();
    await using backup = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
    expect(backup.volumes["drive-scsi0"]?.["bitmap-mode"]).toBe("new");
  });

  it("offers only what was written since a successful backup", async () => {
    await startGuest();
    await fullThenUse();
    await guest.write("drive-scsi0", 5 * GRANULE + 100, seededBytes(1, 4096));
    await guest.writeZeroes("drive-scsi0", 9 * GRANULE, 2 * GRANULE);
    await guest.discard("drive-scsi0", 14 * GRANULE, 65536);
    await using backup = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
    const volume = backup.volumes["drive-scsi0"];
    expect(volume?.["bitmap-mode"]).toBe("reuse");
    expect(await dirtyGranules(volume?.["nbd-path"] ?? "")).toEqual([
      [5, 1],
      [9, 2],
      [14, 1],
    ]);
  });

  it("answers a read outside the dirty ranges with EINVAL, as PVE does", async () => {
    await startGuest();
    await fullThenUse();
    await guest.write("drive-scsi0", 5 * GRANULE, seededBytes(1, 4096));
    await using backup = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
    const uri = uriOf(backup.volumes["drive-scsi0"]?.["nbd-path"] ?? "", "drive-scsi0");
    const read = (offset: number) => runTool("qemu-io", ["-r", "-f", "raw", "-c", `read ${offset} 4096`, uri]);
    await expect(read(5 * GRANULE)).resolves.toMatch(/read 4096\/4096/);
    await expect(read(0).then((text) => `${text}`)).rejects.toThrow(/Invalid argument/);
  });

  it("keeps guest writes during the backup out of the snapshot, and shows them to the guest", async () => {
    await startGuest();
    await guest.write("drive-scsi0", MIB, seededBytes("before", 2 * MIB));
    const oracleDir = path.join(dir, "oracle");
    await using backup = await guest.openBackup({ oracleDir });
    const during = seededBytes("during", 3 * MIB);
    await guest.write("drive-scsi0", 0, during);
    const uri = uriOf(backup.volumes["drive-scsi0"]?.["nbd-path"] ?? "", "drive-scsi0");
    const oracle = backup.oracles.get("drive-scsi0") ?? "";
    expect(await compareImages(uri, "raw", oracle, "raw")).toMatchObject({ identical: true });
    expect((await guest.read("drive-scsi0", 0, 3 * MIB)).equals(during)).toBe(true);
    await guest.copyDisk("drive-scsi0", path.join(dir, "now.raw"));
    expect(await compareRaw(oracle, path.join(dir, "now.raw"))).toMatchObject({ identical: false });
  });

  it("ends the exports and the socket with the backup", async () => {
    await startGuest();
    const backup = await guest.openBackup();
    const socket = backup.volumes["drive-scsi0"]?.["nbd-path"] ?? "";
    await backup.finish(true);
    await expect(stat(socket)).rejects.toThrow(/ENOENT/);
    await expect(runTool("nbdinfo", [uriOf(path.join(dir, "nbd.sock"), "drive-scsi0")])).rejects.toThrow();
  });

  it("lets the backup discard in its own export without harm to the disk", async () => {
    await startGuest();
    await guest.write("drive-scsi0", 0, seededBytes(3, MIB));
    await using backup = await guest.openBackup({ oracleDir: path.join(dir, "oracle") });
    const uri = uriOf(backup.volumes["drive-scsi0"]?.["nbd-path"] ?? "", "drive-scsi0");
    await runTool("qemu-io", ["-f", "raw", "-c", "discard 0 1M", uri]);
    await guest.copyDisk("drive-scsi0", path.join(dir, "now.raw"));
    expect(await compareRaw(backup.oracles.get("drive-scsi0") ?? "", path.join(dir, "now.raw"))).toMatchObject({
      identical: true,
    });
  });

  it("breaks the snapshot, not the guest, when the fleecing image is full", async () => {
    await startGuest();
    await guest.write("drive-scsi0", 0, seededBytes(4, 8 * MIB));
    await using backup = await guest.openBackup({ fleecingBytes: 2 * MIB });
    const overwrite = seededBytes(5, 8 * MIB);
    await guest.write("drive-scsi0", 0, overwrite);
    expect((await guest.read("drive-scsi0", 0, 8 * MIB)).equals(overwrite)).toBe(true);
    const uri = uriOf(backup.volumes["drive-scsi0"]?.["nbd-path"] ?? "", "drive-scsi0");
    await expect(runTool("qemu-io", ["-r", "-f", "raw", "-c", "read 0 8M", uri])).rejects.toThrow(/read failed/);
  });
});

describe("LabBackup.finish()", () => {
  it("keeps writes of during the backup dirty after a success", async () => {
    await startGuest();
    await fullThenUse();
    await guest.write("drive-scsi0", 2 * GRANULE, seededBytes(1, 512));
    const second = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
    await guest.write("drive-scsi0", 7 * GRANULE, seededBytes(2, 512));
    await second.finish(true);
    await using third = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
    expect(await dirtyGranules(third.volumes["drive-scsi0"]?.["nbd-path"] ?? "")).toEqual([[7, 1]]);
  });

  it("merges everything back after a failure", async () => {
    await startGuest();
    await fullThenUse();
    await guest.write("drive-scsi0", 2 * GRANULE, seededBytes(1, 512));
    {
      await using _failed = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
      await guest.write("drive-scsi0", 7 * GRANULE, seededBytes(2, 512));
    }
    await using again = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
    expect(await dirtyGranules(again.volumes["drive-scsi0"]?.["nbd-path"] ?? "")).toEqual([
      [2, 1],
      [7, 1],
    ]);
  });

  it("drops the bitmap in mode none", async () => {
    await startGuest();
    await fullThenUse();
    await (await guest.openBackup()).finish(true);
    expect(await guest.bitmap("drive-scsi0")).toBeUndefined();
  });
});

describe("LabGuest", () => {
  it("tells the node about itself as PVE does", async () => {
    await startGuest({ vmgenid: "0c4e5d0e-8b23-4b2a-9d53-d9f8a1f0e001" });
    const conf = await readFile(path.join(guest.root, "etc/pve/qemu-server/100.conf"), "utf8");
    expect(conf).toMatch(/^scsi0: local-lvm:vm-100-disk-0,size=65536K$/m);
    expect(conf).toMatch(/^vmgenid: 0c4e5d0e-8b23-4b2a-9d53-d9f8a1f0e001$/m);
    expect(conf).not.toMatch(/qmdump/);
    expect(guest.guestConfig).toBe(`${conf}#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n`);
    const pid = (await readFile(path.join(guest.root, "run/qemu-server/100.pid"), "utf8")).trim();
    expect(await readFile(`/proc/${pid}/comm`, "utf8")).toMatch(/^qemu-storage/);
  });

  it("loses its bitmaps in a restart and keeps its content", async () => {
    await startGuest();
    const bytes = seededBytes(6, MIB);
    await guest.write("drive-scsi0", 0, bytes);
    await fullThenUse();
    const pid = guest.pid;
    await guest.restart();
    expect(guest.pid).not.toBe(pid);
    expect(await guest.bitmap("drive-scsi0")).toBeUndefined();
    expect((await guest.read("drive-scsi0", 0, MIB)).equals(bytes)).toBe(true);
  });

  it("brings an old disk and its old bitmap back, with another vmgenid", async () => {
    await startGuest();
    const old = seededBytes("old", 4096);
    await fullThenUse();
    await guest.write("drive-scsi0", 3 * GRANULE, old);
    const state = await guest.saveState();
    await guest.write("drive-scsi0", 3 * GRANULE, seededBytes("new", 4096));
    await (await guest.openBackup({ modes: { "drive-scsi0": "use" } })).finish(true);
    expect((await guest.bitmap("drive-scsi0"))?.dirtyBytes).toBe(0);
    const vmgenid = guest.vmgenid;
    await guest.rollbackWithRam(state);
    expect(guest.vmgenid).not.toBe(vmgenid);
    expect((await guest.read("drive-scsi0", 3 * GRANULE, 4096)).equals(old)).toBe(true);
    await using backup = await guest.openBackup({ modes: { "drive-scsi0": "use" } });
    expect(backup.volumes["drive-scsi0"]?.["bitmap-mode"]).toBe("reuse");
    expect(await dirtyGranules(backup.volumes["drive-scsi0"]?.["nbd-path"] ?? "")).toEqual([[3, 1]]);
  });

  it("adds, resizes and removes disks", async () => {
    await startGuest();
    await guest.addDisk({ device: "drive-virtio1", sizeBytes: MIB + 512, format: "raw" });
    await guest.write("drive-virtio1", MIB, seededBytes(7, 512));
    await guest.resizeDisk("drive-scsi0", SIZE + GRANULE);
    await using backup = await guest.openBackup({ modes: { "drive-virtio1": "new" }, oracleDir: path.join(dir, "o") });
    expect(backup.volumes).toMatchObject({
      "drive-scsi0": { size: SIZE + GRANULE, "bitmap-mode": "none" },
      "drive-virtio1": { size: MIB + 512, "bitmap-mode": "new" },
    });
    expect((await stat(backup.oracles.get("drive-virtio1") ?? "")).size).toBe(MIB + 512);
    await expect(guest.removeDisk("drive-virtio1")).rejects.toThrow(/locks/);
    await backup.finish(true);
    await guest.removeDisk("drive-virtio1");
    expect([...guest.devices.keys()]).toEqual(["drive-scsi0"]);
  });

  it("leaves no process and no socket behind, also after it was killed during a backup", async () => {
    await startGuest();
    const { pid } = guest;
    const backup = await guest.openBackup();
    await guest.kill();
    await backup.finish(false);
    await guest[Symbol.asyncDispose]();
    await expect(stat(`/proc/${pid}`)).rejects.toThrow(/ENOENT/);
    const left = await runTool("find", [dir, "-type", "s", "-o", "-type", "l"]);
    expect(left).toBe("");
  });

  it("hangs while it is frozen and goes on after", async () => {
    await startGuest();
    guest.freeze();
    let isDone = false;
    const write = guest.write("drive-scsi0", 0, seededBytes(8, 512)).then(() => {
      isDone = true;
    });
    await new Promise((resolve) => setTimeout(resolve, 200));
    expect(isDone).toBe(false);
    guest.thaw();
    await write;
  });
});

describe("LabControl", () => {
  it("sets up and tears down a backup for a job that speaks JSON over a socket", async () => {
    await startGuest();
    const socketPath = path.join(dir, "control.sock");
    await using _control = await LabControl.open({ guests: [guest], socketPath });
    const setup = { setup: { vmid: 100, modes: { "drive-scsi0": "new" } } };
    const volume = { size: SIZE, "bitmap-mode": "new", "bitmap-name": BITMAP };
    expect(await askControl(socketPath, setup)).toMatchObject({ volumes: { "drive-scsi0": volume } });
    expect(await askControl(socketPath, setup)).toEqual({ error: "A backup is running already" });
    expect(await askControl(socketPath, { teardown: { vmid: 100, success: true } })).toEqual({});
    expect(await guest.bitmap("drive-scsi0")).toMatchObject({ dirtyBytes: 0, isRecording: true });
  });

  it("answers what it does not understand with an error", async () => {
    await startGuest();
    const socketPath = path.join(dir, "control.sock");
    await using _control = await LabControl.open({ guests: [guest], socketPath });
    expect(await askControl(socketPath, { format: "c" })).toEqual({
      error: 'The lab knows no such question: {"format":"c"}',
    });
    expect(await askControl(socketPath, { setup: { vmid: 7 } })).toEqual({ error: "The lab has no guest 7" });
  });
});

/** One question on a connection of its own. */
async function askControl(socketPath: string, question: object): Promise<unknown> {
  const socket = connect(socketPath);
  socket.write(`${JSON.stringify(question)}\n`);
  for await (const line of createInterface({ input: socket })) {
    socket.destroy();
    return JSON.parse(line);
  }
  throw new Error("The control socket was closed");
}
