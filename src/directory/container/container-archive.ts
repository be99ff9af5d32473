// SPDX-License-Identifier: AGPL-3.0-or-later
// The archive file of a container's backup, between its creation and the commit: created by root, filled by another
// process through an open handle, taken back by root.
import { type FileHandle, statfs } from "node:fs/promises";
import { EnvironmentError, environmentError, formatBytes } from "../../core/index.ts";
import { type Digest, digestFile, preferredDigest, tryCreateDigester } from "../../digest/index.ts";
import { FILE_MODE, type NewFile, type RegularFile } from "../../host/index.ts";

/** A file system that compresses holds more than its size; a planted sparse file claims far more. */
const MOST_TIMES_FILE_SYSTEM = 4;

export class ContainerArchive implements AsyncDisposable {
  readonly path: string;
  readonly #handle: FileHandle;

  private constructor(path: string, handle: FileHandle) {
    this.path = path;
    this.#handle = handle;
  }

  /** @throws EnvironmentError, also if the name is taken */
  static async create({ path, create }: NewFile): Promise<ContainerArchive> {
    try {
      return new ContainerArchive(path, await create());
    } catch (error) {
      throw environmentError("create", path, error);
    }
  }

  /** Leads this host's root to exactly this file, whatever names it has by then, as long as we hold it. */
  get handlePath(): string {
    return `/proc/${process.pid}/fd/${this.#handle.fd}`;
  }

  /** For a tool that has to open it again, through /proc: that requires ownership. */
  async giveTo(userId: number): Promise<void> {
    try {
      await this.#handle.chown(userId, userId);
    } catch (error) {
      throw environmentError("change the owner of", this.path, error);
    }
  }

  /** From here on it belongs to root again. @throws EnvironmentError if it has a second name or an impossible size */
  async takeBack(): Promise<void> {
    const { path } = this;
    try {
      await this.#handle.chown(process.getuid?.() ?? 0, process.getgid?.() ?? 0);
      await this.#handle.chmod(FILE_MODE);
      const { nlink, size } = await this.#handle.stat();
      if (nlink === 0) {
        throw new EnvironmentError(`Cannot commit "${path}": it is not the file that was created for the backup`);
      }
      if (nlink > 1)
        throw new EnvironmentError(`Cannot commit "${path}": it has ${nlink} names (hard links), expected one`);
      const { blocks, bsize } = await statfs(`/proc/self/fd/${this.#handle.fd}`);
      if (size > blocks * bsize * MOST_TIMES_FILE_SYSTEM) {
        throw new EnvironmentError(
          `Cannot commit "${path}": its size is ${formatBytes(size)}, more than the file system holds`,
        );
      }
    } catch (error) {
      throw environmentError("take back", path, error);
    }
  }

  /** The file itself, for a reader; borrowed. @throws EnvironmentError */
  async file(): Promise<RegularFile> {
    try {
      const { nlink, size } = await this.#handle.stat();
      return {
        path: this.path,
        handle: this.#handle,
        fileBytes: size,
        links: nlink,
        [Symbol.asyncDispose]: () => Promise.resolve(),
      };
    } catch (error) {
      throw environmentError("read", this.path, error);
    }
  }

  /** In plain order, from the first byte to the last, as xxhsum and sha256sum do. */
  async digest(signal: AbortSignal): Promise<Digest | undefined> {
    const digester = tryCreateDigester(preferredDigest());
    if (digester === undefined) return undefined;
    return await digestFile({ handle: this.#handle, path: this.path }, digester, signal);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#handle.close().catch(() => undefined); // closed twice
  }
}
