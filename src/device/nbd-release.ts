// SPDX-License-Identifier: AGPL-3.0-or-later
// What remains to be done for a /dev/nbdX whose qemu-nbd has been told to end.
import { setTimeout as sleep } from "node:timers/promises";
import { ChildProcessError } from "../core/index.ts";
import { exists } from "./exists.ts";
import { connectedBy, type NbdHost, nodePath, removeStaleSocket } from "./nbd-host.ts";

const RELEASE_TIMEOUT_MS = 10_000;
const POLL_MS = 10;

/**
 * Waits until the kernel has released the node, which it does when the last program has closed it. A node that another
 * process has connected meanwhile counts as released, too.
 *
 * @param servers process ids of the programs that served it for us
 * @throws ChildProcessError if it is still connected after 10 s
 */
export async function waitForRelease(host: NbdHost, index: number, servers: readonly number[]): Promise<void> {
  const deadline = performance.now() + RELEASE_TIMEOUT_MS;
  for (;;) {
    const thread = await connectedBy(host, index);
    if (thread === undefined) break;
    if ((await exists(`/proc/${thread}`)) && !(await isThreadOfAny(servers, thread))) return;
    if (performance.now() > deadline) {
      const path = JSON.stringify(nodePath(host, index));
      throw new ChildProcessError(`Cannot release ${path}: a program still has it open`);
    }
    await sleep(POLL_MS);
  }
  await removeStaleSocket(host, index);
}

export async function isThreadOfAny(pids: readonly number[], thread: number): Promise<boolean> {
  for (const pid of pids) if (await exists(`/proc/${pid}/task/${thread}`)) return true;
  return false;
}
