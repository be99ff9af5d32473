// SPDX-License-Identifier: AGPL-3.0-or-later
// `pve-backup-host list`: what a store holds.
import { formatBytes, oneLine } from "../core/index.ts";
import type { PointEntry, Store } from "../store/index.ts";
import { print } from "./output.ts";

interface ListOptions {
  readonly vmid?: number | undefined;
  readonly json?: boolean | undefined;
}

/** Prints one line per backup, or a JSON array. @throws as Store.listPoints() and print() */
export async function list(store: Store, options: ListOptions, signal: AbortSignal): Promise<void> {
  const rows = await store.listPoints({ vmid: options.vmid }, signal);
  await print(options.json === true ? `${JSON.stringify(rows, undefined, 2)}\n` : formatTable(rows), signal);
}

function formatTable(rows: readonly PointEntry[]): string {
  const cells = [["BACKUP", "TIME", "SIZE", "KIND", "BASE", "NOTES"], ...rows.map(toCells)];
  const widths = cells[0]?.map((_, column) => Math.max(...cells.map((row) => row[column]?.length ?? 0))) ?? [];
  const lines = cells.map((row) =>
    row
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join("  ")
      .trimEnd(),
  );
  return `${lines.join("\n")}\n`;
}

function toCells(point: PointEntry): string[] {
  const kind = point.kind === "legacy" ? "legacy" : point.parent === undefined ? "full" : "incremental";
  const base = point.parent?.replace(/^backup\//, "") ?? "-";
  return [
    point.archive,
    new Date(point.epoch * 1000).toISOString().replace(".000Z", "Z"),
    formatBytes(point.occupiedBytes),
    point.protected ? `${kind}, protected` : kind,
    point.baseMissing ? `${base} (missing)` : base,
    oneLine(point.notes?.split("\n", 1)[0] ?? ""), // anyone's text, on a terminal
  ];
}
