// SPDX-License-Identifier: AGPL-3.0-or-later
// A file without a name, for lists that pass between us and a tool: the tool opens /proc/self/fd/N.
import { randomUUID } from "node:crypto";
import { type FileHandle, open, unlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { environmentError } from "../core/index.ts";

/** TMPDIR may be a directory that only root may enter, while this process is root of a container only. */
const folders = (): Set<string> => new Set([tmpdir(), "/tmp", "/var/tmp"]);

/** Readable and writable by us alone, gone when closed. The caller closes it. @throws EnvironmentError */
export async function openScratchFile(): Promise<FileHandle> {
  let first: unknown;
  for (const folder of folders()) {
    const path = join(folder, `pve-backup-host-${randomUUID()}`);
    try {
      const handle = await open(path, "wx+", 0o600);
      await unlink(path);
      return handle;
    } catch (cause) {
      first ??= environmentError("create scratch file", path, cause);
    }
  }
  throw first;
}

const WINDOW_BYTES = 256 * 1024;
const NEWLINE = 0x0a;

/** Counts the lines of a growing file, each call from where the last one ended. */
export class LineCounter {
  readonly #handle: FileHandle;
  readonly #window = Buffer.allocUnsafe(WINDOW_BYTES);
  #position = 0;
  #lines = 0;

  constructor(handle: FileHandle) {
    this.#handle = handle;
  }

  /** @returns lines up to the end of the file as it is now */
  async count(): Promise<number> {
    for (;;) {
      const { bytesRead } = await this.#handle.read(this.#window, 0, WINDOW_BYTES, this.#position);
      if (bytesRead === 0) return this.#lines;
      this.#position += bytesRead;
      const bytes = this.#window.subarray(0, bytesRead);
      for (let at = bytes.indexOf(NEWLINE); at >= 0; at = bytes.indexOf(NEWLINE, at + 1)) this.#lines++;
    }
  }
}
