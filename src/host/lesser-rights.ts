// SPDX-License-Identifier: AGPL-3.0-or-later
// With what rights a program runs that reads what a guest or a writer of a share has made: a hole in its parser is
// theirs to use. To have no capability is not enough: user 0 still owns all of root's files and may write them.
import { spawn } from "node:child_process";
import { once } from "node:events";
import type { FileHandle } from "node:fs/promises";

/** "nobody" and "nogroup": ids that own no files. */
const NOBODY = "65534";
const NO_CAPABILITIES = ["--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all"];
const AS_NOBODY = ["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"];
const READ_ANY = "-all,+dac_read_search";
const PROBE_TIMEOUT_MS = 10_000;

let reader: Promise<string[]> | undefined;

/**
 * Flags of setpriv for a program that gets all it needs as open files: it is nobody, in no group, without capabilities
 * and with no way to get any. Where the ids cannot be taken, it only has no capabilities: we are not root, or of a
 * user namespace without these ids, and then root's files of the host are not ours either.
 */
export async function readerFlags(): Promise<string[]> {
  reader ??= firstThatWorks([...AS_NOBODY, ...NO_CAPABILITIES], ["true"], undefined);
  return [...(await reader)];
}

/**
 * The same for a program that opens an inherited file again, by /proc/self/fd/N: of backups root alone may do that.
 * It keeps CAP_DAC_READ_SEARCH. With that it can read every local file by its path; it can write none, and it cannot
 * trace, signal or change anything that is not nobody's. A file server that decides itself who may open a file need
 * not let nobody do it (NFS): for such a file, the program stays the user that we are, without capabilities.
 *
 * @param file borrowed
 */
export async function reopenerFlags(file: FileHandle): Promise<string[]> {
  const flags = [
    ...AS_NOBODY,
    ...["--no-new-privs", "--bounding-set", READ_ANY, "--inh-caps", READ_ANY, "--ambient-caps", READ_ANY],
  ];
  return await firstThatWorks(flags, ["head", "-c", "1", "/proc/self/fd/3"], file);
}

/** Tried, not worked out from ids, namespaces, capabilities and mount options: those are many. */
async function firstThatWorks(
  flags: readonly string[],
  command: readonly string[],
  file: FileHandle | undefined,
): Promise<string[]> {
  if (process.getuid?.() !== 0) return ["--no-new-privs"];
  return (await succeeds([...flags, "--", ...command], file)) ? [...flags] : NO_CAPABILITIES;
}

async function succeeds(args: readonly string[], file: FileHandle | undefined): Promise<boolean> {
  const child = spawn("setpriv", args, {
    cwd: "/",
    stdio: ["ignore", "ignore", "ignore", ...(file === undefined ? [] : [file.fd])],
    timeout: PROBE_TIMEOUT_MS,
    killSignal: "SIGKILL",
  });
  try {
    const [status] = (await once(child, "close")) as [number | null];
    return status === 0;
  } catch {
    return false; // setpriv is missing: whoever needs it says so
  }
}
