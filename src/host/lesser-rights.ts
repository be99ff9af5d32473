// SPDX-License-Identifier: AGPL-3.0-or-later
// The rights of a program that reads what a guest, or a user who can write to a share, has made: they can exploit a
// hole in its parser. Dropping all capabilities is not enough: user 0 still owns root's files and may write them.
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
 * Flags of setpriv for a program that gets all it needs as open files: it runs as the user nobody, in no group, without
 * capabilities and with no way to get any. Where it cannot take these ids, it only loses its capabilities: then we are
 * not root, or are in a user namespace without these ids, and so do not own the host's root files either.
 */
export async function readerFlags(): Promise<string[]> {
  reader ??= firstThatWorks([...AS_NOBODY, ...NO_CAPABILITIES], ["true"], undefined);
  return [...(await reader)];
}

/**
 * The same for a program that opens an inherited file again, by /proc/self/fd/N: only root may do that with a backup.
 * It keeps CAP_DAC_READ_SEARCH. With that it can read every local file by its path; it can write none, and cannot
 * trace, signal or change anything that does not belong to the user nobody. A file server that itself decides who may
 * open a file (NFS) may refuse that user: for such a file, the program keeps our user, without capabilities.
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

/** Found by trying, not worked out from ids, namespaces, capabilities and mount options: there are too many. */
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
    return false; // setpriv is missing: the code that needs it reports that
  }
}
