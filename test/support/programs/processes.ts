// SPDX-License-Identifier: AGPL-3.0-or-later
// Finds processes by text that only this test can have put on their command line.
import { readFileSync } from "node:fs";
import { readdir, readFile } from "node:fs/promises";

/** Pids of living processes, except this one, whose arguments contain `text`. */
export async function processesNaming(text: string): Promise<number[]> {
  const pids: number[] = [];
  for (const entry of await readdir("/proc")) {
    if (!/^[0-9]+$/.test(entry) || Number(entry) === process.pid) continue;
    const command = await readFile(`/proc/${entry}/cmdline`, "utf8").catch(() => "");
    if (command.includes(text)) pids.push(Number(entry));
  }
  return pids;
}

/** Kills a child of this process, which learns of it only after this has returned. */
export function killForCertain(pid: number): void {
  process.kill(pid, "SIGKILL");
  while (!/\) Z /.test(readFileSync(`/proc/${pid}/stat`, "latin1")));
}
