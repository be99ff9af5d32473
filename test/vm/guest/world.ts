// SPDX-License-Identifier: AGPL-3.0-or-later
// What the tests in the machine share: the expected content, a restore as PVE makes it, other users of /dev/nbdX,
// and a look at what is left. Nothing here asks the code under test about nodes: sysfs and /proc are the judges.
import assert from "node:assert/strict";
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { readdir, readFile } from "node:fs/promises";
import { promisify } from "node:util";
import { until } from "../../../fixtures/lab/index.ts";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import { contentOf } from "../content.ts";
import {
  EXPECTED_FILE,
  type Expected,
  type ExpectedDisk,
  type ExpectedPoint,
  GUEST_STORE,
  STOREID,
} from "../protocol.ts";

export const run = promisify(execFile);
export const never = new AbortController().signal;
export const NODES = 3;
export const RUN_DIR = "/run/pve-backup-host";
export const RESERVATIONS = "/run/qemu-server/reserved-dev-nbd-nodes";
export const RESERVATIONS_LOCK = "/run/lock/qemu-server/reserved-dev-nbd-nodes.lock";

type DeviceView = "auto" | "fuse" | "nbd";

const expected = JSON.parse(readFileSync(EXPECTED_FILE, "utf8")) as Expected;
export const points: readonly ExpectedPoint[] = expected.points;
export const fullPoint = points[0] as ExpectedPoint;
export const newestPoint = points.at(-1) as ExpectedPoint;

/** Image of a disk in the full backup, which has no backing file. */
export const fullImage = (disk: ExpectedDisk): string =>
  `${GUEST_STORE}/${fullPoint.volname.slice("backup/".length)}/${disk.device}.qcow2`;

/** A restore in PVE's order of calls, up to the disks on offer. */
export class Restore implements AsyncDisposable {
  readonly log: string[] = [];
  readonly #provider: DirectoryProvider;
  readonly #volname: string;

  private constructor(volname: string, view: DeviceView) {
    this.#volname = volname;
    const scfg = { path: GUEST_STORE, "dir-device-view": view };
    const log = (level: string, message: string): void => void this.log.push(`${level}: ${message}`);
    this.#provider = new DirectoryProvider({ storeid: STOREID, scfg, nodename: "node1", log });
  }

  static async begin(point: ExpectedPoint, view: DeviceView): Promise<Restore> {
    const restore = new Restore(point.volname, view);
    await restore.#provider.restore.restoreGetMechanism(point.volname, never);
    await restore.#provider.restore.restoreVmInit(point.volname, never);
    return restore;
  }

  async offer(device: string): Promise<string> {
    return (await this.#provider.restore.restoreVmVolumeInit(this.#volname, device, never)).qemuImgPath;
  }

  async withdraw(device: string): Promise<void> {
    await this.#provider.restore.restoreVmVolumeCleanup(this.#volname, device);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#provider.restore.restoreVmCleanup(this.#volname);
    await this.#provider[Symbol.asyncDispose]();
  }
}

/** A qemu-nbd that is not ours, connected to `node`; it disconnects when it is disposed. */
export async function connectForeign(node: number, image: string): Promise<AsyncDisposable> {
  const child = spawn("qemu-nbd", ["--read-only", "-f", "qcow2", `--connect=/dev/nbd${node}`, image]);
  await until(`/dev/nbd${node} is connected`, async () => await isConnected(node));
  return {
    [Symbol.asyncDispose]: async () => {
      if (await isConnected(node)) await run("qemu-nbd", ["--disconnect", `/dev/nbd${node}`]);
      await endOf(child);
      await until(`/dev/nbd${node} is free`, async () => !(await isConnected(node)));
    },
  };
}

export async function expectDisk(file: string, { sizeBytes, sha256 }: ExpectedDisk): Promise<void> {
  assert.deepEqual(await contentOf(file), { sizeBytes, sha256 });
}

export async function isConnected(node: number): Promise<boolean> {
  return (await readFile(`/sys/block/nbd${node}/pid`, "utf8").catch(() => "")) !== "";
}

/** Bytes the kernel gives for the node. Source: sectors of 512 bytes, Documentation/ABI/stable/sysfs-block. */
export async function nodeBytes(node: number): Promise<number> {
  return 512 * Number(await readFile(`/sys/block/nbd${node}/size`, "utf8"));
}

export const nodeOf = (file: string): number => Number(/^\/dev\/nbd([0-9]+)$/.exec(file)?.[1] ?? Number.NaN);

/** Command lines of living processes that run `name`, by pid. */
export async function processesOf(name: string): Promise<Map<number, string>> {
  const found = new Map<number, string>();
  for (const entry of await readdir("/proc")) {
    const command = /^[0-9]+$/.test(entry) ? await readFile(`/proc/${entry}/cmdline`, "utf8").catch(() => "") : "";
    const [program = "", ...args] = command.split("\0");
    if (program.split("/").at(-1) === name) found.set(Number(entry), args.join(" "));
  }
  return found;
}

/** Pid of the one qemu-nbd that serves `node`. */
export async function serverOf(node: number): Promise<number> {
  for (const [pid, args] of await processesOf("qemu-nbd")) {
    if (args.includes(`/dev/nbd${node} `)) return pid;
  }
  throw new Error(`no qemu-nbd serves /dev/nbd${node}`);
}

/** Everything a restore may hold; all lists are empty when nothing is left. */
export async function leftovers(): Promise<Record<string, unknown[]>> {
  const nodes = Array.from({ length: NODES }, (_, node) => node);
  const connected = await Promise.all(
    nodes.map(async (node) => [(await isConnected(node)) || (await nodeBytes(node)) > 0, node]),
  );
  return {
    connected: connected.filter(([isUsed]) => isUsed).map(([, node]) => node),
    servers: [...(await processesOf("qemu-nbd")), ...(await processesOf("qemu-storage-daemon"))],
    mounts: (await readFile("/proc/self/mounts", "utf8")).split("\n").filter((line) => line.includes(RUN_DIR)),
    folders: await readdir(RUN_DIR).catch(() => []),
    reservations: (await readFile(RESERVATIONS, "utf8").catch(() => "")).split("\n").filter((line) => line !== ""),
  };
}

export const nothing = { connected: [], servers: [], mounts: [], folders: [], reservations: [] };

/** This program in another process, with a role of its own; its standard error is the console. */
export function startRole(role: string, ...args: string[]): ChildProcess {
  const program = process.argv[1] ?? "";
  return spawn(process.execPath, [program, role, ...args], { stdio: ["pipe", "pipe", "inherit"] });
}

export async function endOf(child: ChildProcess): Promise<void> {
  if (child.exitCode === null && child.signalCode === null) await once(child, "exit");
}

/** All a role printed, once it has ended well. */
export async function outputOf(child: ChildProcess): Promise<string> {
  let text = "";
  child.stdout?.setEncoding("utf8").on("data", (part: string) => {
    text += part;
  });
  const [status, signal] = (await once(child, "close")) as [number | null, string | null];
  if (status !== 0) throw new Error(`a process ended with ${status ?? signal}: ${text}`);
  return text;
}

/** The first line a role prints. */
export async function firstLine(child: ChildProcess): Promise<string> {
  let text = "";
  for await (const part of child.stdout ?? []) {
    text += String(part);
    const end = text.indexOf("\n");
    if (end >= 0) return text.slice(0, end);
  }
  throw new Error(`a process ended without a line: ${text}`);
}

export async function refusalOf(promise: Promise<unknown>): Promise<{ message: string; hint: string }> {
  const error = await promise.then(
    (value) => new Error(`not refused but answered ${JSON.stringify(value)}`),
    (thrown: unknown) => thrown,
  );
  const { message, hint } = error as { message: string; hint?: string };
  return { message, hint: hint ?? "" };
}
