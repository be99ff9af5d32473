// SPDX-License-Identifier: AGPL-3.0-or-later
// A raw view as a file: qemu-storage-daemon's FUSE export where this QEMU has it, otherwise nbdfuse in front of a
// qemu-nbd.

import { stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { ChildProcessError, CleanupStack, environmentError } from "../core/index.ts";
import type { ChildProcess } from "../host/index.ts";
import { lendChain } from "./chain-node.ts";
import { hasFuseExport, startFuseExport } from "./fuse-export.ts";
import { mountsBelow } from "./mounts.ts";
import { startNbdfuse } from "./nbdfuse.ts";
import { ViewFolder } from "./view-folder.ts";
import type { RawView, RawViewOptions } from "./view-options.ts";
import { waitUntilServed } from "./wait-until-served.ts";

const READY_TIMEOUT_MS = 30_000;

/** @throws as openRawView() */
export async function openFuseView(options: RawViewOptions): Promise<RawView> {
  const { mechanism, name, runDir, signal, sizeBytes } = options;
  const isExport = mechanism === "fuse-export" || (mechanism !== "nbdfuse" && (await hasFuseExport()));
  await using stack = new CleanupStack();
  const folder = stack.use(await ViewFolder.create(runDir));
  const chain = await lendChain(options.chain, folder.path);
  const file = path.join(folder.path, `${name}.raw`);
  await writeFile(file, "", { mode: 0o600, flag: "wx" }).catch((error: unknown) => {
    throw environmentError("create", file, error);
  }); // what the mount covers
  const start = isExport ? startFuseExport : startNbdfuse;
  const servers = await start({ chain, file, folder, stack, signal });
  await waitForFile(file, servers, options);
  const owned = stack.move();
  const findTrouble = async (): Promise<string | undefined> => {
    for (const server of servers) if (await server.hasEnded()) return `${server.name} ${server.describeExit()}`;
    return (await mountsBelow(file)).length === 0 ? "its file was unmounted" : undefined;
  };
  return { path: file, sizeBytes, findTrouble, [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose]() };
}

/** Waits until the mount exists and its file answers with the expected size. */
async function waitForFile(file: string, servers: readonly ChildProcess[], options: RawViewOptions): Promise<void> {
  const act = `Cannot offer ${JSON.stringify(options.name)} as a raw file`;
  const wait = { act, servers, timeoutMs: READY_TIMEOUT_MS, signal: options.signal };
  const sizeBytes = await waitUntilServed(wait, async () => {
    if ((await mountsBelow(file)).length === 0) return undefined;
    const status = await stat(file).catch(() => undefined); // asked too early
    return status?.size;
  });
  if (sizeBytes !== options.sizeBytes) {
    throw new ChildProcessError(`${act}: the image holds ${sizeBytes} bytes, expected ${options.sizeBytes}`);
  }
}
