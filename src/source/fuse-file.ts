// SPDX-License-Identifier: AGPL-3.0-or-later
// The file behind a handle of the Perl process: nbdfuse on QEMU's NBD export, opened once more here.
//
// O_DIRECT, because otherwise the kernel would read ahead, and outside of the dirty ranges every read fails.
// FUSE passes such a read on unchanged: offset, length and buffer need no alignment.
import { constants } from "node:fs";
import { type FileHandle, open, readlink } from "node:fs/promises";
import { EnvironmentError, environmentError, errnoOf, HostError } from "../core/index.ts";
import { FuseCalls } from "../device/index.ts";
import type { HandleReference } from "../provider/index.ts";
import { brokenSnapshot } from "./source-failure.ts";

/** The errors that nbdfuse passes on when QEMU refuses what it offered; see source-failure.ts. */
const BROKEN_SNAPSHOT = new Set(["EINVAL", "EACCES"]);
/** The errors of calls once the server is gone or its connection has been aborted. */
const GONE = new Set(["ENOTCONN", "ECONNABORTED", "ENODEV"]);

export class FuseFile implements AsyncDisposable {
  /** As the kernel names it. */
  readonly path: string;
  readonly #device: string;
  readonly #calls: FuseCalls;
  #handle: FileHandle | undefined;
  #sizeBytes = 0;

  private constructor(device: string, filePath: string, calls: FuseCalls) {
    this.#device = device;
    this.path = filePath;
    this.#calls = calls;
  }

  /**
   * Opens the file behind handle `fd` of process `pid` for reading.
   *
   * @param silenceMs how long the file's server may be silent while an answer is due
   * @throws EnvironmentError if the handle does not exist, or the file cannot be opened in time
   */
  static async open(
    device: string,
    { pid, fd }: HandleReference,
    silenceMs: number,
    signal: AbortSignal,
  ): Promise<FuseFile> {
    const link = `/proc/${pid}/fd/${fd}`;
    const filePath = await readlink(link).catch((error: unknown) => {
      throw new EnvironmentError(
        `Cannot open the file handle of "${device}": process ${pid} has no open handle ${fd}`,
        { cause: error },
      );
    });
    const calls = await FuseCalls.on(filePath, silenceMs);
    const file = new FuseFile(device, filePath, calls);
    try {
      file.#handle = await calls.run(() => open(link, constants.O_RDONLY | constants.O_DIRECT), signal);
      const handle = file.#handle;
      file.#sizeBytes = (await calls.run(() => handle.stat(), signal)).size;
      return file;
    } catch (error) {
      await file[Symbol.asyncDispose]();
      signal.throwIfAborted();
      throw file.#sentence("open", error);
    }
  }

  get sizeBytes(): number {
    return this.#sizeBytes;
  }

  /** Fills `target` completely, or throws. `target` is borrowed until the promise settles, no longer. */
  async read(offset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    const handle = this.#handle;
    if (handle === undefined) throw new Error(`the file of ${this.#device} is closed`);
    try {
      for (let done = 0; done < target.length; ) {
        const length = target.length - done;
        const { bytesRead } = await this.#calls.run(() => handle.read(target, done, length, offset + done), signal);
        if (bytesRead === 0) throw new EnvironmentError(`it ended at byte ${offset + done}`);
        done += bytesRead;
      }
    } catch (error) {
      signal.throwIfAborted();
      throw this.#sentence("read", error);
    }
  }

  /** Waits for the Perl side's call on its handle: if the server hangs there, its connection is aborted, too. */
  watch<T>(call: () => Promise<T>, signal: AbortSignal): Promise<T> {
    return this.#calls.watch(call, signal);
  }

  /** Never fails: nothing was written, so nothing can get lost. */
  async [Symbol.asyncDispose](): Promise<void> {
    const handle = this.#handle;
    this.#handle = undefined;
    if (handle !== undefined) await this.#calls.runLast(() => handle.close()).catch(() => undefined);
  }

  #sentence(act: "open" | "read", error: unknown): HostError {
    const { silentForMs } = this.#calls;
    const errno = errnoOf(error);
    const says = (state: string, code = errno): HostError =>
      new EnvironmentError(`Cannot ${act} "${this.#device}" through its file handle: ${state}`, {
        cause: error,
        errno: code,
      });
    if (silentForMs !== undefined) return says(`no answer for ${silentForMs / 1000} s`, "ETIMEDOUT");
    if (errno !== undefined && GONE.has(errno)) return says(`the nbdfuse process behind it is gone (${errno})`);
    if (error instanceof HostError) return says(error.message);
    if (act === "read" && errno !== undefined && BROKEN_SNAPSHOT.has(errno))
      return brokenSnapshot(this.#device, errno, error);
    return environmentError(act, this.#device, error);
  }
}
