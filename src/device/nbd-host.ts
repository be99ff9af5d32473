// SPDX-License-Identifier: AGPL-3.0-or-later
// The current state of the kernel's /dev/nbdX nodes: which exist, which are in use, and by which process.
import { lstat, readFile, rm, stat } from "node:fs/promises";
import path from "node:path";
import { EnvironmentError, errnoOf } from "../core/index.ts";
import { exists } from "./exists.ts";

/** Nodes beyond this many are ignored, whatever nbds_max says. */
const MAX_NODES = 4_096;
const SECTOR_BYTES = 512;

/** Where the kernel and other programs keep what belongs to /dev/nbdX. */
export interface NbdHost {
  readonly sys: string;
  readonly dev: string;
  /** Where qemu-nbd --connect puts its socket; fixed in QEMU's source. */
  readonly sockets: string;
  /** /run, which holds the reservations of nodes. */
  readonly run: string;
}

/** @param root directory that stands for "/" where programs keep files; kernel and devices are never moved */
export function nbdHost(root = ""): NbdHost {
  return { sys: "/sys", dev: "/dev", sockets: "/var/lock", run: path.join(root || "/", "run") };
}

export function nodePath(host: NbdHost, index: number): string {
  return path.join(host.dev, `nbd${index}`);
}

export async function hasNbdModule(host: NbdHost): Promise<boolean> {
  return await exists(path.join(host.sys, "module/nbd"));
}

/**
 * The number of nodes: they are /dev/nbd0 up to one less.
 *
 * @throws EnvironmentError, with the modprobe line as hint, if the module is not loaded
 */
export async function countNodes(host: NbdHost): Promise<number> {
  if (!(await hasNbdModule(host))) {
    throw new EnvironmentError("Cannot use /dev/nbdX: the kernel module nbd is not loaded", { hint: modprobeHint(16) });
  }
  const file = path.join(host.sys, "module/nbd/parameters/nbds_max");
  const count = await readNumber(file);
  if (count === undefined) throw new EnvironmentError(`Cannot use /dev/nbdX: ${JSON.stringify(file)} holds no number`);
  return Math.min(count, MAX_NODES);
}

/** @param nodes how many nodes the module should create */
export function modprobeHint(nodes: number): string {
  const options = `nbds_max=${nodes} max_part=0`;
  return (
    `load it: modprobe nbd ${options} (at every boot: nbd in /etc/modules-load.d/nbd.conf, ` +
    `"options nbd ${options}" in /etc/modprobe.d/nbd.conf)`
  );
}

/** True if the node exists, and neither the kernel nor a qemu-nbd that is just starting uses it. */
export async function isNodeFree(host: NbdHost, index: number, bound: ReadonlySet<string>): Promise<boolean> {
  const device = await stat(nodePath(host, index)).catch(() => undefined);
  if (device?.isBlockDevice() !== true) return false;
  if ((await readNumber(sysFile(host, index, "size"))) !== 0) return false;
  if (await exists(sysFile(host, index, "pid"))) return false;
  return !(await isServed(host, index, bound));
}

/** Process or thread that keeps the node connected, as the kernel names it; undefined if it is not connected. */
export async function connectedBy(host: NbdHost, index: number): Promise<number | undefined> {
  return await readNumber(sysFile(host, index, "pid"));
}

export async function nodeBytes(host: NbdHost, index: number): Promise<number> {
  return ((await readNumber(sysFile(host, index, "size"))) ?? 0) * SECTOR_BYTES;
}

/** Paths of all bound Unix sockets of this host. Connecting to a socket would take qemu-nbd's only place. */
export async function boundSockets(): Promise<ReadonlySet<string>> {
  const table = await readFile("/proc/net/unix", "utf8").catch(() => "");
  // Num RefCount Protocol Flags Type St Inode Path; proc(5)
  return new Set(table.split("\n").map((line) => path.basename(line.split(" ").at(-1) ?? "")));
}

/**
 * Removes the socket file of a qemu-nbd that was killed, because other programs take it as a sign of a node in use. If
 * another qemu-nbd starts at this very moment it loses the file, not the node: it has connected to the socket itself.
 */
export async function removeStaleSocket(host: NbdHost, index: number): Promise<void> {
  const bound = await boundSockets();
  if (!(await exists(socketPath(host, index))) || (await isServed(host, index, bound))) return;
  await rm(socketPath(host, index), { force: true }).catch(() => undefined);
}

/** True while a qemu-nbd of root listens for this node; a file that a killed one left behind does not count. */
async function isServed(host: NbdHost, index: number, bound: ReadonlySet<string>): Promise<boolean> {
  const file = socketPath(host, index);
  const status = await lstat(file).catch(() => undefined);
  return status?.isSocket() === true && status.uid === process.geteuid?.() && bound.has(path.basename(file));
}

function socketPath(host: NbdHost, index: number): string {
  return path.join(host.sockets, `qemu-nbd-nbd${index}`);
}

function sysFile(host: NbdHost, index: number, name: string): string {
  return path.join(host.sys, `block/nbd${index}`, name);
}

/** undefined if the file does not exist or does not contain a number. */
async function readNumber(file: string): Promise<number | undefined> {
  const text = await readFile(file, "latin1").catch((error: unknown) => {
    if (errnoOf(error) === undefined) throw error;
    return "";
  });
  const digits = /^[0-9]{1,15}$/.exec(text.trim())?.[0];
  return digits === undefined ? undefined : Number(digits);
}
