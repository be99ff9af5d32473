// SPDX-License-Identifier: AGPL-3.0-or-later
// What the bench found: a table for people, JSON for programs.
import { execFileSync } from "node:child_process";
import { cpus, totalmem } from "node:os";
import { formatBytes, MIB } from "../../src/core/index.ts";
import { seconds } from "./contest.ts";

/** One line of the table. */
export interface Row {
  readonly measure: string;
  readonly ours: string;
  readonly against: string;
  /** What is compared with the goal. */
  readonly value: number;
  readonly unit: "times" | "MiB" | "s" | "%";
  /** Undefined where the line only helps to understand the others. */
  readonly goal: number | undefined;
  readonly isGoalMinimum: boolean;
  /** Single measurements, in milliseconds or bytes, by side. */
  readonly samples?: Readonly<Record<string, readonly number[]>>;
}

/** How many times faster than `theirMs` we are. */
export function speedRow(measure: string, ourMs: number, theirMs: number, goal: number): Row {
  return {
    measure,
    ours: seconds(ourMs),
    against: seconds(theirMs),
    value: theirMs / ourMs,
    unit: "times",
    goal,
    isGoalMinimum: true,
  };
}

/** How many times as long, or as much, as the other side; no more than `goal`. */
export function limitRow(measure: string, ours: string, against: string, value: number, goal: number | undefined): Row {
  return { measure, ours, against, value, unit: "times", goal, isGoalMinimum: false };
}

export function memoryRow(measure: string, bytes: number, goalMib: number): Row {
  const value = bytes / MIB;
  return { measure, ours: formatBytes(bytes), against: "", value, unit: "MiB", goal: goalMib, isGoalMinimum: false };
}

/** How far `measured` is from `wanted`, in per cent of it; no more than `goalPercent`. */
export function deviationRow(measure: string, measured: number, wanted: number, goalPercent: number): Row {
  return {
    measure,
    ours: `${formatBytes(measured)}/s`,
    against: `${formatBytes(wanted)}/s`,
    value: Math.abs(measured / wanted - 1) * 100,
    unit: "%",
    goal: goalPercent,
    isGoalMinimum: false,
  };
}

export function isMet({ goal, isGoalMinimum, value }: Row): boolean {
  if (goal === undefined) return true;
  return isGoalMinimum ? value >= goal : value <= goal;
}

const HEAD = ["measure", "ours", "against", "result", "goal", ""];

/** A Markdown table, aligned, so that it reads well in a terminal too. */
export function formatTable(rows: readonly Row[]): string {
  const cells = rows.map((row) => [
    row.measure,
    row.ours,
    row.against,
    quantity(row.value, row.unit),
    goalText(row),
    row.goal === undefined ? "" : isMet(row) ? "met" : "MISSED",
  ]);
  const widths = HEAD.map((head, column) => Math.max(head.length, ...cells.map((line) => line[column]?.length ?? 0)));
  const format = (line: readonly string[]): string =>
    `| ${line.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join(" | ")} |`;
  const rule = `| ${widths.map((width) => "-".repeat(width)).join(" | ")} |`;
  return [format(HEAD), rule, ...cells.map(format)].join("\n");
}

function quantity(value: number, unit: Row["unit"]): string {
  const digits = { times: 2, s: 2, "%": 1, MiB: 0 }[unit];
  return `${value.toFixed(digits)}${unitSuffix(unit)}`;
}

function goalText({ goal, isGoalMinimum, unit }: Row): string {
  return goal === undefined ? "" : `${isGoalMinimum ? "≥" : "≤"} ${goal}${unitSuffix(unit)}`;
}

const unitSuffix = (unit: Row["unit"]): string => (unit === "times" ? "x" : ` ${unit}`);

interface Machine {
  readonly cores: number;
  readonly cpu: string;
  readonly memoryBytes: number;
  readonly versions: Readonly<Record<string, string>>;
}

export function describeMachine(): Machine {
  const firstLine = (command: string): string =>
    execFileSync(command, ["--version"], { encoding: "utf8" }).split("\n")[0]?.trim() ?? "";
  return {
    cores: cpus().length,
    cpu: cpus()[0]?.model ?? "",
    memoryBytes: totalmem(),
    versions: {
      node: process.version,
      "qemu-img": firstLine("qemu-img"),
      nbdcopy: firstLine("nbdcopy"),
      kernel: execFileSync("uname", ["-r"], { encoding: "utf8" }).trim(),
    },
  };
}
