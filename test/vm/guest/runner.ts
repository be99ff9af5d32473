// SPDX-License-Identifier: AGPL-3.0-or-later
// Runs the tests one after the other in the test machine and reports each as a line of JSON.
import { writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { ResultLine } from "../protocol.ts";

/** Against a hang; a test that takes this long has failed, and so has everything after it. */
const TEST_TIMEOUT_MS = 400_000;

export interface VmTest {
  readonly name: string;
  readonly run: () => Promise<void>;
}

/** @returns false if a test hung: the machine is of no use any more */
export async function runTests(tests: readonly VmTest[]): Promise<boolean> {
  report({ kind: "plan", names: tests.map(({ name }) => name) });
  for (const { name, run } of tests) {
    const startMs = performance.now();
    const timer = new AbortController();
    const limit = sleep(TEST_TIMEOUT_MS, "hangs" as const, { signal: timer.signal }).catch(() => undefined);
    const outcome = await Promise.race([run().then(() => undefined, describe), limit]);
    timer.abort();
    report({ kind: "result", name, ms: performance.now() - startMs, error: outcome });
    if (outcome === "hangs") return false;
  }
  return true;
}

const describe = (error: unknown): string => (error instanceof Error ? (error.stack ?? error.message) : String(error));

function report(line: ResultLine): void {
  writeSync(1, `${JSON.stringify(line)}\n`);
}
