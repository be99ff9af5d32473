// SPDX-License-Identifier: AGPL-3.0-or-later
// `pve-backup-host list`: what a store holds.
import { formatBytes, oneLine } from "../core/index.ts";
import type { PointEntry, Store } from "../store/index.ts";

interface ListOptions {
  readonly vmid?: number | undefined;
  readonly json?: boolean | undefined;
}

/** Prints one line a backup, or a JSON array. */
export async function list(store: Store, options: ListOptions, signal: AbortSignal): Promise<void> {
  const points = await store.listPoints({ vmid: options.vmid }, signal);
  if (options.json === true) {
    console.log(JSON.stringify(points, undefined, 2));
    return;
  }
  const rows = [["BACKUP", "TIME", "SIZE", "KIND", "BASE", "NOTES"], ...points.map(toRow)];
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? [];
  for (const row of rows)
    console.log(
      row
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join("  ")
        .trimEnd(),
    );
}

function toRow(point: PointEntry): string[] {
  const kind = point.kind === "legacy" ? "legacy" : point.parent === undefined ? "full" : "incremental";
  return [
    point.archive,
    new Date(point.epoch * 1000).toISOString().replace(".000Z", "Z"),
    formatBytes(point.occupiedBytes),
    point.protected ? `${kind}, protected` : kind,
    point.parent?.replace(/^backup\//, "") ?? "-",
    oneLine(point.notes?.split("\n", 1)[0] ?? ""), // somebody else's words on a terminal
  ];
}
