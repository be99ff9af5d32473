// SPDX-License-Identifier: AGPL-3.0-or-later
// A raw view as a block device: our qemu-nbd, connected to a /dev/nbdX that no other process uses.

import { execFile } from "node:child_process";
import { open } from "node:fs/promises";
import { promisify } from "node:util";
import { ChildProcessError, CleanupStack } from "../core/index.ts";
import { ChildProcess } from "../host/index.ts";
import { lendChain, nestedChainName, serverOptions } from "./chain-node.ts";
import { connectedBy, type NbdHost, nodeBytes } from "./nbd-host.ts";
import { isThreadOfAny, waitForRelease } from "./nbd-release.ts";
import { type NbdReservation, reserveNbdNode } from "./nbd-reservation.ts";
import { ViewFolder } from "./view-folder.ts";
import type { RawView, RawViewOptions } from "./view-options.ts";
import { waitUntilServed } from "./wait-until-served.ts";

/** Less than a reservation's 60 s: while qemu-nbd opens the images, nothing else shows that the node is taken. */
const READY_TIMEOUT_MS = 30_000;
const DISCONNECT_TIMEOUT_MS = 5_000;
/** How long a qemu-nbd that has lost its node may take to end. */
const DYING_MS = 2_000;
const SECTOR_BYTES = 512;

/** What qemu-nbd says when the kernel refuses a node because another process has it. */
const NODE_TAKEN = /Failed to set NBD socket/;

const run = promisify(execFile);

type NbdViewOptions = RawViewOptions & { readonly host: NbdHost };

/** @throws as openRawView() */
export async function openNbdView(options: NbdViewOptions): Promise<RawView> {
  const { host, signal } = options;
  const tried = new Set<number>();
  for (;;) {
    await using node = await reserveNbdNode({ host, except: tried, signal });
    const view = await connect(node, options);
    if (view !== undefined) return view;
    tried.add(node.index); // a program that knows nothing of reservations was quicker
  }
}

/** @returns undefined if another program has the node */
async function connect(node: NbdReservation, options: NbdViewOptions): Promise<RawView | undefined> {
  const { host, runDir, sizeBytes } = options;
  await using stack = new CleanupStack();
  const folder = await ViewFolder.create(runDir);
  let isReleased = true;
  // The record of a node that could not be released stays, so that the sweep can try again.
  stack.defer(async () => {
    if (isReleased) await folder[Symbol.asyncDispose]();
  });
  const chain = await lendChain(options.chain, folder.path);
  const args = planConnect(node.path, chain.names);
  await folder.setNbdNode(node.index);
  const server = await ChildProcess.start("qemu-nbd", args, serverOptions(chain));
  stack.defer(async () => {
    isReleased = false;
    await disconnect(host, node, server);
    isReleased = true;
  });
  await folder.addChild(server);
  try {
    await waitForNode(node, server, options);
  } catch (error) {
    if (server.hasExited && NODE_TAKEN.test(server.describeExit())) return undefined;
    throw error;
  }
  server.forgetOutput(); // --verbose: before connecting the node it named the whole chain, in JSON
  const owned = stack.move();
  const findTrouble = async (): Promise<string | undefined> => {
    if ((await connectedBytes(host, node.index, server)) === sizeBytes) return undefined;
    const isDying = await server.endsWithin(DYING_MS); // the kernel frees the node first
    return isDying ? `qemu-nbd ${server.describeExit()}` : `qemu-nbd has lost ${node.path}`;
  };
  return { path: node.path, sizeBytes, findTrouble, [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose]() };
}

/** qemu-nbd's arguments. --verbose keeps it in the foreground, as a child whose death we see and that dies with us. */
export function planConnect(device: string, chain: readonly string[]): string[] {
  return ["--verbose", "--read-only", `--connect=${device}`, "--", nestedChainName(chain)];
}

/**
 * Waits until the kernel shows the node as connected by `server`, with the right size, and the image answers.
 *
 * @throws ChildProcessError if `server` ends, the size is wrong, or the wait takes too long; the abort reason
 */
async function waitForNode(node: NbdReservation, server: ChildProcess, options: NbdViewOptions): Promise<void> {
  const act = `Cannot offer ${JSON.stringify(options.name)} as ${JSON.stringify(node.path)}`;
  const wait = { act, servers: [server], timeoutMs: READY_TIMEOUT_MS, signal: options.signal };
  await waitUntilServed(wait, async () => {
    const bytes = await connectedBytes(options.host, node.index, server);
    if (bytes === 0) return undefined;
    if (bytes !== options.sizeBytes) {
      throw new ChildProcessError(`${act}: the image holds ${bytes} bytes, expected ${options.sizeBytes}`);
    }
    await readFirstSector(node.path).catch((cause: unknown) => {
      throw new ChildProcessError(`${act}: it cannot be read`, { cause });
    });
    return true;
  });
}

/** 0 until `server` has connected the node and the kernel has set its size, which comes second. */
async function connectedBytes(host: NbdHost, index: number, server: ChildProcess): Promise<number> {
  return (await isConnectedBy(host, index, server)) ? await nodeBytes(host, index) : 0;
}

async function readFirstSector(device: string): Promise<void> {
  await using handle = await open(device, "r");
  await handle.read(Buffer.alloc(SECTOR_BYTES), 0, SECTOR_BYTES, 0);
}

/** The kernel names the thread of qemu-nbd that connected the node. */
async function isConnectedBy(host: NbdHost, index: number, server: ChildProcess): Promise<boolean> {
  const thread = await connectedBy(host, index);
  return thread !== undefined && (await isThreadOfAny([server.pid], thread));
}

/** @throws ChildProcessError if the node is still not free at the end */
async function disconnect(host: NbdHost, node: NbdReservation, server: ChildProcess): Promise<void> {
  if (await isConnectedBy(host, node.index, server)) {
    const options = { timeout: DISCONNECT_TIMEOUT_MS, killSignal: "SIGKILL" } as const;
    await run("qemu-nbd", ["--disconnect", node.path], options).catch(() => undefined); // ending it disconnects, too
  }
  await server[Symbol.asyncDispose]();
  await waitForRelease(host, node.index, [server.pid]);
}
