// SPDX-License-Identifier: AGPL-3.0-or-later
// The commands of a documentation page, run exactly as printed, because an administrator copies them.
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import path from "node:path";
import { promisify } from "node:util";

const run = promisify(execFile);
const PROJECT = path.resolve(import.meta.dirname, "../../..");

/** The commands in one section of a page. */
export class PageCommands {
  readonly #sections = new Map<string, string[]>();

  /** @param kind the word after the fence of the blocks to run: "sh", "sh-squashfs" */
  constructor(page: string, kind: string) {
    let section = "";
    let block: string[] | undefined;
    for (const line of readFileSync(path.join(PROJECT, page), "utf8").split("\n")) {
      const heading = line.match(/^#{2,} (.*)$/);
      if (block === undefined && heading !== null) section = heading[1] ?? "";
      else if (line === `\`\`\`${kind}`) block = [];
      else if (line === "```" && block !== undefined) {
        this.#sections.set(section, [...(this.#sections.get(section) ?? []), block.join("\n")]);
        block = undefined;
      } else block?.push(line);
    }
  }

  get sections(): string[] {
    return [...this.#sections.keys()];
  }

  /** The blocks of a section, in order. @throws Error if it has none */
  blocks(section: string): readonly string[] {
    const blocks = this.#sections.get(section);
    if (blocks === undefined) throw new Error(`The page has no commands in "${section}"`);
    return blocks;
  }
}

interface ShellOptions {
  /** Programs that are found before the system's. */
  readonly binDir: string;
  readonly cwd: string;
  /** Stands for /etc/subuid and /etc/subgid. */
  readonly idMapFile: string;
}

/**
 * Runs a script as root's bash would, up to its first failure, in a separate mount namespace.
 * | @returns its output, both streams
 * @throws Error with its output if it fails
 */
export async function runShell(script: string, { binDir, cwd, idMapFile }: ShellOptions): Promise<string> {
  const ids = ["/etc/subuid", "/etc/subgid"].map((file) => `mount --bind '${idMapFile}' ${file}`);
  const whole = ["exec 2>&1", "set -eu -o pipefail", ...ids, script].join("\n");
  const env = { ...process.env, PATH: `${binDir}:${process.env.PATH}`, LC_ALL: "C", TMPDIR: cwd };
  try {
    const { stdout } = await run("unshare", ["--mount", "bash", "-c", whole], { cwd, env });
    return stdout;
  } catch (error) {
    throw new Error(`The commands failed: ${(error as { stdout?: string }).stdout ?? String(error)}`, { cause: error });
  }
}
