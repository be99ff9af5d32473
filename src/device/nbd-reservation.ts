// SPDX-License-Identifier: AGPL-3.0-or-later
// Which process gets which /dev/nbdX: all providers on a node share a file of reservations, in the format and under the
// lock of Proxmox VE's example provider. A reservation covers the time until the kernel shows a node as used.
import { constants } from "node:fs";
import { open, rename, writeFile } from "node:fs/promises";
import path from "node:path";
import { EnvironmentError, environmentError, errnoOf, HostError } from "../core/index.ts";
import { lockFile } from "./file-lock.ts";
import { boundSockets, countNodes, isNodeFree, modprobeHint, type NbdHost, nodePath } from "./nbd-host.ts";
import { makePublic, makePublicFolder } from "./public-files.ts";

const LOCK_TIMEOUT_MS = 10_000;
const VALID_SECONDS = 60;
const MAX_FILE_BYTES = 64 * 1024;

/** Node number to the second of its reservation. */
type Reservations = Map<number, number>;

interface ReserveOptions {
  readonly host: NbdHost;
  /** Nodes not to try. */
  readonly except?: ReadonlySet<number>;
  readonly signal: AbortSignal;
}

/** A node that we may connect. Disposing gives it back; so does the passing of 60 s, or our death. */
export interface NbdReservation extends AsyncDisposable {
  readonly index: number;
  readonly path: string;
}

/**
 * Reserves the first node that is neither in use nor reserved.
 *
 * @throws EnvironmentError, with the modprobe line as hint, if the module is missing or no node is free; also if the
 *   file of reservations cannot be locked within 10 s, or cannot be read or written
 * @throws the abort reason of `signal`
 */
export async function reserveNbdNode({ host, except, signal }: ReserveOptions): Promise<NbdReservation> {
  const count = await countNodes(host);
  await using _lock = await lockReservations(host, signal);
  const now = nowSeconds();
  const reservations = await readReservations(host, now);
  const bound = await boundSockets();
  for (let index = 0; index < count; index++) {
    if (reservations.has(index) || except?.has(index) === true) continue;
    if (!(await isNodeFree(host, index, bound))) continue;
    reservations.set(index, now);
    await writeReservations(host, reservations);
    return reservationOf(host, index, now);
  }
  throw new EnvironmentError(`Cannot use /dev/nbdX: none of ${count} nodes is free`, {
    hint: `with "modprobe -r nbd" while none is in use, then ${modprobeHint(Math.max(16, 2 * count))}, there are more`,
  });
}

function reservationOf(host: NbdHost, index: number, reservedAt: number): NbdReservation {
  let isOurs = true;
  return {
    index,
    path: nodePath(host, index),
    [Symbol.asyncDispose]: async () => {
      if (isOurs) await giveBack(host, index, reservedAt);
      isOurs = false;
    },
  };
}

/**
 * The reservations that are valid at `now`, in seconds. Reservations from the future count no longer than others;
 * otherwise a clock that was set back would block nodes for hours. Lines that are not reservations are ignored.
 */
export function parseReservations(text: string, now: number): Reservations {
  const reservations: Reservations = new Map();
  for (const line of text.split("\n")) {
    const match = /^([0-9]{1,9})\s([0-9]{1,12})$/.exec(line);
    if (match === null) continue;
    const reservedAt = Number(match[2]);
    if (Math.abs(now - reservedAt) < VALID_SECONDS) reservations.set(Number(match[1]), reservedAt);
  }
  return reservations;
}

export function formatReservations(reservations: ReadonlyMap<number, number>): string {
  return [...reservations].map(([index, reservedAt]) => `${index} ${reservedAt}\n`).join("");
}

/** A reservation that cannot be given back expires by itself, so a failure here does no harm. */
async function giveBack(host: NbdHost, index: number, reservedAt: number): Promise<void> {
  try {
    await using _lock = await lockReservations(host, new AbortController().signal);
    const reservations = await readReservations(host, nowSeconds());
    if (reservations.get(index) !== reservedAt) return; // expired, and another process may have it by now
    reservations.delete(index);
    await writeReservations(host, reservations);
  } catch (error) {
    if (!(error instanceof HostError)) throw error;
  }
}

async function lockReservations(host: NbdHost, signal: AbortSignal): Promise<AsyncDisposable> {
  const file = path.join(host.run, "lock/qemu-server/reserved-dev-nbd-nodes.lock");
  return await lockFile(file, LOCK_TIMEOUT_MS, signal);
}

/** A missing file, or something that is not a file, holds no reservation; writing replaces it. */
async function readReservations(host: NbdHost, now: number): Promise<Reservations> {
  const file = reservationFile(host);
  try {
    await using handle = await open(file, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    if (!(await handle.stat()).isFile()) return new Map();
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(MAX_FILE_BYTES), 0, MAX_FILE_BYTES, 0);
    return parseReservations(buffer.toString("latin1", 0, bytesRead), now);
  } catch (error) {
    if (errnoOf(error) === "ENOENT" || errnoOf(error) === "ELOOP") return new Map();
    throw environmentError("read", file, error);
  }
}

/** Replaced by a rename, as Perl's file_set_contents() does, so that a half-written file is never read. */
async function writeReservations(host: NbdHost, reservations: Reservations): Promise<void> {
  const file = reservationFile(host);
  try {
    await makePublicFolder(path.dirname(file));
    await writeFile(`${file}.new`, formatReservations(reservations));
    await makePublic(`${file}.new`);
    await rename(`${file}.new`, file);
  } catch (error) {
    throw environmentError("write", file, error);
  }
}

function reservationFile(host: NbdHost): string {
  return path.join(host.run, "qemu-server/reserved-dev-nbd-nodes");
}

function nowSeconds(): number {
  return Math.floor(Date.now() / 1000);
}
