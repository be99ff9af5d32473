// SPDX-License-Identifier: AGPL-3.0-or-later
// The other way to make a raw file, for a QEMU without FUSE: nbdfuse in front of a qemu-nbd.

import { readFile } from "node:fs/promises";
import path from "node:path";
import { ChildProcess } from "../host/index.ts";
import { nestedChainName, serverOptions } from "./chain-node.ts";
import type { ServeOptions } from "./fuse-export.ts";
import { waitUntilServed } from "./wait-until-served.ts";

const SOCKET_TIMEOUT_MS = 30_000;

export async function startNbdfuse({ chain, file, folder, stack, signal }: ServeOptions): Promise<ChildProcess[]> {
  const socket = path.join(folder.path, "nbd");
  const nbdArgs = ["--read-only", "--persistent", "--shared=0", "--socket", socket, nestedChainName(chain.names)];
  const server = stack.use(await ChildProcess.start("qemu-nbd", nbdArgs, serverOptions(chain)));
  await folder.addChild(server);
  const act = `Cannot serve ${JSON.stringify(chain.names[0])}`;
  const wait = { act, servers: [server], timeoutMs: SOCKET_TIMEOUT_MS, signal };
  await waitUntilServed(wait, () => isListenedAt(socket));
  // Disposed in reverse: nbdfuse releases the mount first.
  const mount = stack.use(
    await ChildProcess.start("nbdfuse", ["--readonly", file, "--unix", socket], { orphanedBy: "TERM" }),
  );
  await folder.addChild(mount);
  return [server, mount];
}

/**
 * The socket file exists a moment before qemu-nbd listens, and a client that connects in between is refused for good.
 * The kernel is asked, because qemu-nbd reports a client that leaves at once as an error.
 */
async function isListenedAt(socket: string): Promise<boolean> {
  const lines = (await readFile("/proc/net/unix", "utf8")).split("\n");
  // Source: proc(5): Num RefCount Protocol Flags Type St Inode Path; the flag is __SO_ACCEPTCON
  return lines.some((line) => line.split(" ")[3] === "00010000" && line.endsWith(` ${socket}`));
}
