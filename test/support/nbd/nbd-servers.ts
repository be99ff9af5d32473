// SPDX-License-Identifier: AGPL-3.0-or-later
// Real NBD servers as children: each is started on its own socket and ended by the handle that started it.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { NbdAddress } from "../../../src/nbd/address.ts";

export interface ScratchFolder extends AsyncDisposable {
  readonly path: string;
  readonly file: (name: string) => string;
}

export async function scratchFolder(): Promise<ScratchFolder> {
  const path = await mkdtemp(join(tmpdir(), "nbd-test-"));
  return {
    path,
    file: (name) => join(path, name),
    [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }),
  };
}

export interface NbdServer extends AsyncDisposable {
  readonly address: NbdAddress;
  readonly child: ChildProcess;
}

/** Starts `command` and waits until a server answers at `address`. */
export async function startNbdServer(
  address: NbdAddress,
  command: string,
  args: readonly string[],
): Promise<NbdServer> {
  const child = spawn(command, args, { stdio: ["ignore", "ignore", "pipe"] });
  let complaint = "";
  child.stderr?.on("data", (data: Buffer) => {
    complaint += data;
  });
  const exited = once(child, "exit");
  for (let attempt = 0; !(await isListening(address)); attempt++) {
    if (child.exitCode !== null || attempt > 500) {
      child.kill("SIGKILL");
      throw new Error(`${command} ${args.join(" ")} does not listen: ${complaint}`);
    }
    await sleep(20);
  }
  return {
    address,
    child,
    async [Symbol.asyncDispose]() {
      if (child.exitCode === null && child.signalCode === null) child.kill("SIGKILL");
      await exited;
    },
  };
}

async function isListening(address: NbdAddress): Promise<boolean> {
  const socket =
    address.transport === "unix"
      ? connect({ path: address.path })
      : connect({ host: address.host, port: address.port });
  try {
    await once(socket, "connect");
    return true;
  } catch {
    return false;
  } finally {
    socket.destroy();
  }
}

/** A TCP port that was free a moment ago. */
export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}
