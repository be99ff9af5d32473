// SPDX-License-Identifier: AGPL-3.0-or-later
// Compares what a restore reads with the recorded checksums, while it is read: the files are in the page cache then, or
// soon will be. A restore whose files are not what was written fails when Proxmox VE gives back what it was offered.
import { UnsupportedError } from "../core/index.ts";
import { type Digest, type FileRange, verifyFile } from "../digest/index.ts";
import type { RegularFile } from "../host/index.ts";
import { PointDamagedError } from "../store/index.ts";

interface RecordedFile {
  /** Borrowed until the check is disposed. */
  readonly file: RegularFile;
  /** Undefined for a file of which no checksum is recorded: it is not compared. */
  readonly digest: Digest | undefined;
  /** In which order its bytes were digested; default: from the first to the last. */
  readonly order?: readonly FileRange[];
}

export class ContentCheck implements AsyncDisposable {
  readonly #abort = new AbortController();
  readonly #done: Promise<void>;

  /**
   * @param what is restored, for messages
   * @param warn called if this system lacks the algorithm: then nothing is compared
   */
  constructor(what: string, files: readonly RecordedFile[], warn: (message: string) => void) {
    this.#done = compare(what, files, this.#abort.signal).catch((error: unknown) => {
      if (!(error instanceof UnsupportedError)) throw error;
      warn(error.message);
    });
    this.#done.catch(() => undefined); // reported by finish()
  }

  /**
   * Waits until everything was compared.
   *
   * @throws PointDamagedError naming the first file that is not what was written; EnvironmentError if it cannot be read
   */
  async finish(): Promise<void> {
    await this.#done;
  }

  /** Stops comparing. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#abort.abort(new Error("nobody waits for the comparison any more"));
    await this.#done.catch(() => undefined);
  }
}

/** What the log says of a restore with dir-verify-restore 0. */
export function notVerified(volname: string): string {
  return `restoring "${volname}" without comparing it with its checksums (dir-verify-restore 0)`;
}

async function compare(what: string, files: readonly RecordedFile[], signal: AbortSignal): Promise<void> {
  for (const { file, digest, order } of files) {
    if (digest === undefined || (await verifyFile(file, digest, signal, order))) continue;
    throw new PointDamagedError(
      `Cannot verify the restored "${what}": checksum mismatch in "${file.path}" (${digest.algorithm})`,
      { hint: "restore another backup; dir-verify-restore 0 restores what is left of this one" },
    );
  }
}
