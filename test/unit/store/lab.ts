// SPDX-License-Identifier: AGPL-3.0-or-later
// A store in a temporary folder, and backups made without a guest: images are a header written by hand.
import { createHash, randomUUID } from "node:crypto";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CleanupStack } from "../../../src/core/index.ts";
import type { ProcessIdentity } from "../../../src/host/index.ts";
import { type GuestIdentity, parseArchiveName } from "../../../src/pve/index.ts";
import { Base } from "../../../src/store/base.ts";
import { openChain } from "../../../src/store/chain.ts";
import { openStoreFolder, type StoreContext } from "../../../src/store/context.ts";
import { type DurableIo, durableIo } from "../../../src/store/durable.ts";
import { HeldChains } from "../../../src/store/held-chains.ts";
import {
  deviceFileName,
  type LockTiming,
  type Point,
  type StagedDevice,
  type StagedPoint,
  Store,
} from "../../../src/store/index.ts";
import type { LockNeed } from "../../../src/store/lock/chain-lock.ts";
import { takeSnapshot } from "../../../src/store/snapshot.ts";

export const MIB = 1024 * 1024;
export const NEVER = new AbortController().signal;
export const VMGENID = "11111111-2222-3333-4444-555555555555";
export const FAST_TIMING: LockTiming = { heartbeatMs: 20, staleMs: 400, observeMs: 120 };

export interface Lab extends AsyncDisposable {
  readonly path: string;
  readonly root: string;
  readonly warnings: string[];
  open(options?: { storeid?: string; io?: DurableIo; path?: string; timing?: LockTiming }): Promise<Store>;
  /** Path of the witness of a guest through "bk". */
  witnessPath(vmid: number): string;
}

export async function createLab(isCluster = true): Promise<Lab> {
  const base = await mkdtemp(join(tmpdir(), "pbh-store-"));
  const path = join(base, "store");
  const root = join(base, "root");
  await mkdir(path);
  await mkdir(join(root, isCluster ? "etc/pve/priv" : "etc"), { recursive: true });
  const warnings: string[] = [];
  const stores: Store[] = [];
  return {
    path,
    root,
    warnings,
    open: async (options = {}) => {
      const store = await Store.open({
        path,
        storeid: "bk",
        root,
        nodename: "pve1",
        warn: (line) => void warnings.push(line),
        timing: FAST_TIMING,
        ...options,
      });
      stores.push(store);
      return store;
    },
    witnessPath: (vmid) =>
      join(root, isCluster ? "etc/pve/priv/pve-backup-host" : "var/lib/pve-backup-host", "bk", `${vmid}.json`),
    [Symbol.asyncDispose]: async () => {
      for (const store of stores) await store[Symbol.asyncDispose]();
      await rm(base, { recursive: true, force: true });
    },
  };
}

/** A qcow2 image without data, field by field. Source: QEMU docs/interop/qcow2, "Header". */
export function imageBytes(virtualBytes: number, backing?: string, format = "qcow2"): Buffer {
  const bytes = Buffer.alloc(4 * 65536);
  bytes.write("QFI\xfb", 0, "latin1"); // magic
  bytes.writeUInt32BE(3, 4); // version
  bytes.writeUInt32BE(16, 20); // cluster_bits: 64 KiB
  bytes.writeBigUInt64BE(BigInt(virtualBytes), 24); // size
  bytes.writeUInt32BE(Math.max(1, Math.ceil(virtualBytes / (512 * MIB))), 36); // l1_size
  bytes.writeBigUInt64BE(65536n, 40); // l1_table_offset
  bytes.writeBigUInt64BE(131072n, 48); // refcount_table_offset
  bytes.writeUInt32BE(1, 56); // refcount_table_clusters
  bytes.writeUInt32BE(4, 96); // refcount_order: 16 bits
  bytes.writeUInt32BE(104, 100); // header_length
  if (backing === undefined) return bytes;
  bytes.writeUInt32BE(0xe2792aca, 104); // extension: backing file format name
  bytes.writeUInt32BE(format.length, 108);
  bytes.write(format, 112);
  bytes.writeBigUInt64BE(136n, 8); // backing_file_offset, behind the end-of-extensions entry
  bytes.writeUInt32BE(Buffer.byteLength(backing), 16); // backing_file_size
  bytes.write(backing, 136);
  return bytes;
}

/** The same as QEMU lays it out, with sound tables: refcount table, refcount block, L1 table. */
export function legacyImageBytes(virtualBytes: number, backing?: string): Buffer {
  const bytes = imageBytes(virtualBytes, backing);
  bytes.writeBigUInt64BE(196608n, 40); // l1_table_offset
  bytes.writeBigUInt64BE(65536n, 48); // refcount_table_offset
  bytes.writeBigUInt64BE(131072n, 65536); // the one refcount block
  for (let cluster = 0; cluster < 4; cluster++) bytes.writeUInt16BE(1, 131072 + 2 * cluster);
  return bytes;
}

interface BackupPlan {
  vmid?: number;
  epoch: number;
  /** Virtual size by device. */
  devices?: Readonly<Record<string, number>>;
  base?: Point;
  /** null: a config without vmgenid. */
  vmgenid?: string | null;
  process?: ProcessIdentity;
}

/** Writes what a job writes into the staging folder, and returns what it reports. */
export async function fillStaged(staged: StagedPoint, plan: BackupPlan): Promise<StagedDevice[]> {
  const vmgenid = plan.vmgenid === null ? "" : `vmgenid: ${plan.vmgenid ?? VMGENID}\n`;
  await staged.writeFile("guest.conf", Buffer.from(`memory: 512\n${vmgenid}\xff\n`, "latin1"));
  const devices: StagedDevice[] = [];
  for (const [name, virtualBytes] of Object.entries(plan.devices ?? { "drive-scsi0": 64 * MIB })) {
    const base = plan.base?.devices.has(name) === true ? plan.base : undefined;
    const bytes = imageBytes(
      virtualBytes,
      base === undefined ? undefined : `../${base.folderName}/${deviceFileName(name)}`,
    );
    bytes.write(randomUUID(), 3 * 65536); // no two images are alike
    await staged.writeFile(deviceFileName(name), bytes);
    devices.push({
      name,
      virtualBytes,
      isIncremental: base !== undefined,
      reason: base === undefined ? "first backup" : "",
      compression: "none",
      readBytes: 0,
      writtenBytes: bytes.length,
      zeroBytes: 0,
      fileBytes: bytes.length,
      digest: { algorithm: "sha256", value: createHash("sha256").update(bytes).digest("hex") },
    });
  }
  return devices;
}

/** A whole backup: lock, stage, commit, unlock. */
export async function backup(store: Store, plan: BackupPlan): Promise<Point> {
  await using lock = await store.lockGuest(plan.vmid ?? 100, NEVER);
  await using staged = await store.beginPoint({ lock, type: "qemu", epoch: plan.epoch, signal: NEVER });
  const devices = await fillStaged(staged, plan);
  await using base = plan.base === undefined ? undefined : await holdBase(store, plan.base);
  return await staged.commit({ devices, base, process: plan.process }, NEVER);
}

/** A point as findBase() holds it, whatever the witnesses say. */
export async function holdBase(store: Store, { archive, vmid }: Point): Promise<Base> {
  await using owned = new CleanupStack();
  const folder = owned.use(await openStoreFolder(store.path));
  const rest = { storeid: "bk", root: "/nowhere", nodename: "pve1", io: durableIo, timing: FAST_TIMING };
  const context: StoreContext = { path: store.path, folder, ...rest, warn: () => undefined };
  const snapshot = owned.use(await takeSnapshot(context, vmid, NEVER));
  const point = await snapshot.points.point(parseArchiveName(archive));
  const held = owned.use(await HeldChains.open(context, snapshot.points, point, "required", NEVER));
  return new Base(context, { snapshot, held, distrust: undefined }, owned.move());
}

/** A point as a reader holds it. */
export async function holdChains(
  store: Store,
  { archive, vmid }: Pick<Point, "archive" | "vmid">,
  signal: AbortSignal = NEVER,
  need?: LockNeed,
): Promise<Pick<HeldChains, "chains" | "names" | "assertHeld"> & AsyncDisposable> {
  await using owned = new CleanupStack();
  const points = owned.use(await store.pointsOf(vmid));
  const held = owned.use(await store.holdChains(points, archive, signal, need));
  const all = owned.move();
  const { chains, names } = held;
  return {
    chains,
    names,
    assertHeld: () => held.assertHeld(),
    [Symbol.asyncDispose]: () => all[Symbol.asyncDispose](),
  };
}

/** findBase() for the guest as backup() makes it. */
export async function decide(
  store: Store,
  change: { device?: string; sizeBytes?: number; guest?: GuestIdentity; vmid?: number } = {},
): Promise<string> {
  const { device = "drive-scsi0", sizeBytes = 64 * MIB, ...rest } = change;
  const devices = new Map([[device, { size: sizeBytes }]]);
  const question = { vmid: 100, devices, guest: { vmgenid: VMGENID }, signal: NEVER, ...rest };
  const { base: found, reasons } = await store.findBase(question, async () => undefined);
  await using base = found;
  if (base?.distrust !== undefined) return `compare with ${base.point.archive}: ${base.distrust}`;
  return base?.chains.has(device) === true ? `use ${base.point.archive}` : (reasons.get(device) ?? "no reason");
}

/** The chain behind a device by its names, opened and closed again. */
export async function resolveChain(
  store: Store,
  point: Point,
  device: string,
  signal: AbortSignal,
): Promise<{ paths: string[]; folders: readonly string[]; sizeBytes: number }> {
  await using points = await store.pointsOf(point.vmid);
  await using chain = await openChain(points, point, device, signal);
  const { files, sizeBytes } = chain;
  return { paths: files.map(({ path }) => path), folders: chain.points.map(({ folderName }) => folderName), sizeBytes };
}

/** A folder as the upstream example leaves it. */
export async function makeLegacy(
  lab: Lab,
  folder: string,
  disks: Readonly<Record<string, Buffer>>,
  mapped: readonly string[] = Object.keys(disks),
): Promise<string> {
  const path = join(lab.path, "100", folder);
  await mkdir(path, { recursive: true });
  const map = mapped.map((name) => `#qmdump#map:${name.replace("drive-", "")}:${name}:local-lvm:raw:\n`).join("");
  await writeFile(join(path, "guest.conf"), `memory: 512\n${map}`);
  await writeFile(join(path, "firewall.conf"), "[OPTIONS]\n");
  for (const [name, bytes] of Object.entries(disks)) await writeFile(join(path, `${name}.qcow2`), bytes);
  return path;
}

export async function readJson(path: string): Promise<Record<string, unknown>> {
  return JSON.parse(await readFile(path, "utf8")) as Record<string, unknown>;
}

/** Reads a JSON file, changes it, writes it back: what an accident or an attacker does. */
export async function editJson(path: string, edit: (value: Record<string, unknown>) => void): Promise<void> {
  const value = await readJson(path);
  edit(value);
  await writeFile(path, JSON.stringify(value));
}
