// SPDX-License-Identifier: AGPL-3.0-or-later
// Takes and releases fake /dev/nbdX nodes: `node nbd-contender.mjs HOST_JSON ROUNDS`. The kernel's part, refusing a
// node that another process has, is played by creating the node's pid file exclusively. Prints a line per collision,
// then "done".
import { rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { NbdHost } from "../../../src/device/index.ts";
import { reserveNbdNode } from "../../../src/device/nbd-reservation.ts";

const host = JSON.parse(process.argv[2] ?? "") as NbdHost;
const rounds = Number(process.argv[3]);
const signal = new AbortController().signal;
for (let round = 0; round < rounds; round++) {
  const node = await reserveNbdNode({ host, signal });
  const pidFile = path.join(host.sys, `block/nbd${node.index}/pid`);
  try {
    await writeFile(pidFile, `${process.pid}\n`, { flag: "wx" });
  } catch (error) {
    process.stdout.write(`collision at ${node.index}: ${String(error)}\n`);
    continue;
  }
  await node[Symbol.asyncDispose](); // from here on the kernel shows that the node is taken
  await sleep(round % 4);
  await rm(pidFile);
}
process.stdout.write("done\n");
