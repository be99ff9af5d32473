// SPDX-License-Identifier: AGPL-3.0-or-later
// The programs of fixtures/pve as processes: the shim under perl -T, with a bridge behind it.
import { type ChildProcess, type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { once } from "node:events";
import path from "node:path";
import { createInterface } from "node:readline";

const project = path.resolve(import.meta.dirname, "../../..");
const fixtures = path.join(project, "fixtures/pve");

export interface ScriptOptions {
  /** The bundle that the shim starts. */
  readonly bridge: string;
  /** Stands for / where the product reads /etc/pve, /run and /var/lib. */
  readonly root: string;
  /** Directory of the shim's Perl modules; default: this checkout's. */
  readonly perlDir?: string;
  /** Further directories of Perl modules. */
  readonly perlDirs?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
}

export function startScript(
  name: string,
  args: readonly string[],
  { bridge, root, perlDir = path.join(project, "perl-shim"), perlDirs = [], env = {} }: ScriptOptions,
): ChildProcessWithoutNullStreams {
  const includes = [perlDir, ...perlDirs, path.join(fixtures, "lib")].flatMap((folder) => ["-I", folder]);
  return spawn("perl", ["-T", ...includes, path.join(fixtures, name), ...args], {
    stdio: "pipe",
    env: {
      ...process.env,
      PVE_BACKUP_HOST_NODE: process.execPath,
      PVE_BACKUP_HOST_BRIDGE: bridge,
      PVE_BACKUP_HOST_ROOT: root,
      ...env,
    },
  });
}

export interface ProgramResult {
  readonly status: number | null;
  readonly output: string;
}

export interface Program {
  readonly child: ChildProcess;
  readonly result: Promise<ProgramResult>;
  /** What it has printed so far. */
  readonly lines: readonly string[];
  /** Resolves with the first matching line. */
  line(pattern: RegExp): Promise<string>;
}

/** The output of a child, line by line, and its end. */
export function watch(child: ChildProcess): Program {
  const lines: string[] = [];
  const waiting: Array<{ pattern: RegExp; resolve: (line: string) => void }> = [];
  for (const stream of [child.stdout, child.stderr]) {
    if (stream === null) continue;
    createInterface({ input: stream }).on("line", (line) => {
      lines.push(line);
      for (const { pattern, resolve } of waiting) if (pattern.test(line)) resolve(line);
    });
  }
  const result = once(child, "close").then(([status]) => ({
    status: status as number | null,
    output: lines.join("\n"),
  }));
  const line = async (pattern: RegExp): Promise<string> => {
    const known = lines.find((one) => pattern.test(one));
    if (known !== undefined) return known;
    const found = new Promise<string>((resolve) => waiting.push({ pattern, resolve }));
    const ended = result.then(({ output }) => {
      throw new Error(`no line ${pattern} in:\n${output}`);
    });
    return await Promise.race([found, ended]);
  };
  return { child, result, lines, line };
}
