// SPDX-License-Identifier: AGPL-3.0-or-later
// Which backups a retention keeps: PVE's own rules, as in its documentation and in `pvesm prune-backups`. Pure: no
// disk, no clock. The periods are those of this process's time zone, as they are in PVE.

/** How many to keep of each kind; 0 or absent: the rule is not used. */
export interface Keep {
  /** Keep everything, whatever the other options say. */
  readonly all?: boolean;
  readonly last?: number;
  readonly hourly?: number;
  readonly daily?: number;
  readonly weekly?: number;
  readonly monthly?: number;
  readonly yearly?: number;
}

export interface PruneCandidate {
  readonly vmid: number;
  readonly subtype: string;
  /** Unix time in seconds. */
  readonly ctime: number;
  readonly protected: boolean;
}

type PruneMark = "keep" | "remove" | "protected";

const DAY_MS = 86_400_000;

/** In the order in which they choose: name of the rule, and the period a time lies in. */
const RULES: ReadonlyArray<readonly [Exclude<keyof Keep, "all">, (ctime: number) => string]> = [
  ["last", String],
  ["hourly", (ctime) => `${dayOf(ctime)} ${local(ctime).getHours()}`],
  ["daily", dayOf],
  ["weekly", isoWeekOf],
  ["monthly", (ctime) => `${local(ctime).getFullYear()}-${local(ctime).getMonth()}`],
  ["yearly", (ctime) => String(local(ctime).getFullYear())],
];

/**
 * A mark for each backup, in the order of `backups`. Each guest is a separate group. A protected backup is never
 * removed, and counts for no rule. Without any option everything is kept.
 */
export function markBackups(backups: readonly PruneCandidate[], keep: Keep): PruneMark[] {
  const marks = new Map<PruneCandidate, PruneMark>();
  const groups = new Map<string, PruneCandidate[]>();
  for (const backup of backups) {
    if (backup.protected) {
      marks.set(backup, "protected");
      continue;
    }
    const name = `${backup.subtype}/${backup.vmid}`;
    groups.set(name, [...(groups.get(name) ?? []), backup]);
  }
  const rules = keep.all === true ? [] : RULES.filter(([name]) => (keep[name] ?? 0) > 0);
  for (const group of rules.length === 0 ? [] : groups.values()) {
    const newestFirst = [...group].sort((a, b) => b.ctime - a.ctime);
    for (const [name, periodOf] of rules) applyRule(newestFirst, keep[name] ?? 0, periodOf, marks);
    for (const backup of newestFirst) if (!marks.has(backup)) marks.set(backup, "remove");
  }
  return backups.map((backup) => marks.get(backup) ?? "keep");
}

/**
 * Marks each backup, and removes those that the retention does not keep, in the order of `backups`. Without `remove`, it only marks.
 *
 * @throws what `remove` throws; what is left then stays
 */
export async function prune<T extends PruneCandidate>(
  backups: readonly T[],
  keep: Keep,
  remove: ((backup: T) => Promise<void>) | undefined,
): Promise<Array<T & { readonly mark: PruneMark }>> {
  const marks = markBackups(backups, keep);
  const marked = backups.map((backup, index) => ({ ...backup, mark: marks[index] ?? "keep" }));
  for (const [index, backup] of backups.entries()) if (marks[index] === "remove") await remove?.(backup);
  return marked;
}

/**
 * Keeps the newest backup of each of the next `count` periods. Periods in which an earlier rule keeps a backup are
 * passed over and do not count; what an earlier rule gave up is not considered again.
 */
function applyRule(
  newestFirst: readonly PruneCandidate[],
  count: number,
  periodOf: (ctime: number) => string,
  marks: Map<PruneCandidate, PruneMark>,
): void {
  const covered = new Set(newestFirst.filter((b) => marks.get(b) === "keep").map((b) => periodOf(b.ctime)));
  const chosen = new Set<string>();
  for (const backup of newestFirst) {
    const period = periodOf(backup.ctime);
    if (marks.has(backup) || covered.has(period)) continue;
    if (chosen.has(period)) {
      marks.set(backup, "remove");
      continue;
    }
    if (chosen.size >= count) return;
    chosen.add(period);
    marks.set(backup, "keep");
  }
}

function local(ctime: number): Date {
  return new Date(ctime * 1000);
}

function dayOf(ctime: number): string {
  const date = local(ctime);
  return `${date.getFullYear()}-${date.getMonth()}-${date.getDate()}`;
}

/** A week belongs to the year that its Thursday lies in. Source: ISO 8601. */
function isoWeekOf(ctime: number): string {
  const date = local(ctime);
  const day = Date.UTC(date.getFullYear(), date.getMonth(), date.getDate());
  const thursday = day + (4 - (date.getDay() || 7)) * DAY_MS;
  const year = new Date(thursday).getUTCFullYear();
  const week = 1 + Math.floor((thursday - Date.UTC(year, 0, 1)) / (7 * DAY_MS));
  return `${year}-W${week}`;
}
