// SPDX-License-Identifier: AGPL-3.0-or-later
// Judges images in a process of its own, so that its memory can be looked at: `node judge-images.mjs IMAGE...`
// prints what is said of each and, last, the most memory that was ever in use, in KiB.
import { readFileSync } from "node:fs";
import { checkQcow2, openChain } from "../../support/qcow2/open-images.ts";

const { signal } = new AbortController();

async function judge(path: string): Promise<string> {
  try {
    const { errorCount, errors } = await checkQcow2(path, { signal });
    if (errorCount > 0) return `${errorCount} errors: ${errors[0]}`;
    await using chain = await openChain([path], signal);
    await chain.read(0, Buffer.alloc(Math.min(chain.virtualBytes, 2 ** 22)), signal);
    return "sound";
  } catch (error) {
    return (error as Error).message;
  }
}

for (const path of process.argv.slice(2)) process.stdout.write(`${await judge(path)}\n`);
const [, peakKib = ""] = /^VmHWM:\s*([0-9]+) kB$/m.exec(readFileSync("/proc/self/status", "utf8")) ?? [];
process.stdout.write(`${peakKib}\n`);
