// SPDX-License-Identifier: AGPL-3.0-or-later
// Measures programs against each other: in turns, so that what else the machine does hits all of them.
import { runTimed } from "./processes.ts";

/** One side. `run` makes its output anew; `remove` deletes it. Only the returned time counts. */
export interface Contestant {
  readonly name: string;
  readonly run: () => Promise<number>;
  readonly remove: () => Promise<void>;
}

/** Times in milliseconds, in the order of the runs. */
type Times = ReadonlyMap<string, readonly number[]>;

/** Runs A B C, A B C, …; the disk is quiet before each run. */
export async function compete(
  contestants: readonly Contestant[],
  runs: number,
  progress: (line: string) => void,
): Promise<Times> {
  const times = new Map<string, number[]>(contestants.map(({ name }) => [name, []]));
  for (let round = 1; round <= runs; round++) {
    for (const { name, remove, run } of contestants) {
      await remove();
      await runTimed("sync", []);
      const ms = await run();
      times.get(name)?.push(ms);
      progress(`${name}: ${seconds(ms)} (run ${round} of ${runs})`);
    }
  }
  for (const { remove } of contestants) await remove();
  return times;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  const [low, high] = [sorted[sorted.length % 2 === 0 ? middle - 1 : middle], sorted[middle]];
  if (low === undefined || high === undefined) throw new RangeError("no values, no median");
  return (low + high) / 2;
}

export const medianOf = (times: Times, name: string): number => median(times.get(name) ?? []);

export function seconds(ms: number): string {
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}
