// SPDX-License-Identifier: AGPL-3.0-or-later
// Commit numbers. Each is higher than all before it, including those of points that are gone; but a number that
// others wrote into a file on the share must not use up all of them.
import type { CatalogEntry, CompleteEntry } from "./catalog.ts";
import type { StoreContext } from "./context.ts";
import type { FoundState } from "./state.ts";

/** How far one trusted number may be above another: a backup a minute for two years. */
const MAX_SEQUENCE_STEP = 2 ** 20;

/** The number of the next point. A number far above the rest is ignored, with a warning. */
export function nextSequence(context: StoreContext, entries: readonly CatalogEntry[], found: FoundState): number {
  const points = entries.filter((entry): entry is CompleteEntry => entry.kind === "complete");
  let highest = 0;
  for (const { manifest, name } of points.sort((a, b) => a.manifest.sequence - b.manifest.sequence)) {
    if (manifest.sequence - highest > MAX_SEQUENCE_STEP) {
      const state = `its commit number ${manifest.sequence} is far above the others (${highest})`;
      context.warn(
        `Ignoring the commit number of "${name.archive}": ${state}; until it is moved away, backups are full`,
      );
      break;
    }
    highest = manifest.sequence;
  }
  if (found.kind === "damaged")
    context.warn(`Cannot use state.json: ${found.reason}; using the commit numbers of the backups`);
  if (found.kind !== "state") return highest + 1;
  const { sequence } = found.state;
  if (sequence - highest <= MAX_SEQUENCE_STEP) return Math.max(sequence, highest) + 1;
  context.warn(`Ignoring the commit number in state.json: ${sequence} is far above that of the backups (${highest})`);
  return highest + 1;
}
