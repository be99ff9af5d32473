// SPDX-License-Identifier: AGPL-3.0-or-later
// A directory that others may write to, held by its descriptor. Its contents are reached through that descriptor, one
// name at a time, and no link is followed: swapping the directory, or something in it, for something else does not lead
// us there. /proc/self/fd/N is that directory itself, whatever has its name by now.
import { constants } from "node:fs";
import { type FileHandle, link, lstat, mkdir, open, readdir, rename, rmdir, unlink } from "node:fs/promises";
import { join } from "node:path";
import { errnoOf } from "../core/index.ts";
import { openRoot } from "./open-root.ts";
import {
  type FileIdentity,
  FileProblem,
  isSameFile,
  READ_FLAGS,
  type RegularFile,
  readWhole,
  toRegularFile,
} from "./regular-file.ts";

/** Files and directories that only their owner may use: backups hold secrets. */
export const FILE_MODE = 0o600;
export const FOLDER_MODE = 0o700;

const FOLDER_FLAGS = constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW;
const CREATE_FLAGS = constants.O_RDWR | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
/** The unit of st_blocks, whatever block size the file system has. */
const BLOCK_BYTES = 512;
/** We never nest anything deeper than three. */
const MAX_DEPTH = 32;

/** What a name in a directory is; links are not followed. */
export interface FolderEntry extends FileIdentity {
  readonly kind: "file" | "folder" | "link" | "other";
  readonly sizeBytes: number;
  readonly occupiedBytes: number;
  readonly mtimeMs: number;
  /** How many names it has. */
  readonly links: number;
}

/** One name in a directory; in bytes where it need not be UTF-8: what others put there must be removable, too. */
type Name = string | Buffer;

export class Folder implements AsyncDisposable {
  /** For messages: its path when it was opened. */
  readonly path: string;
  readonly identity: FileIdentity;
  readonly #handle: FileHandle;

  private constructor(path: string, handle: FileHandle, identity: FileIdentity) {
    this.path = path;
    this.#handle = handle;
    this.identity = identity;
  }

  /**
   * Opens the directory at an absolute path that the administrator chose; see openRoot() for links in the path.
   *
   * @throws FileProblem if it is not a directory, or is behind a link on a share; the system's error
   */
  static async open(path: string): Promise<Folder> {
    return await Folder.#of(path, await openRoot(path));
  }

  static async #of(path: string, handle: FileHandle): Promise<Folder> {
    try {
      const { dev, ino } = await handle.stat({ bigint: true });
      return new Folder(path, handle, { dev, ino });
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  /** For messages. */
  pathOf(name: Name): string {
    return join(this.path, String(name));
  }

  /** @throws FileProblem if it is a link or not a directory; the system's error */
  async openFolder(name: Name): Promise<Folder> {
    const handle = await open(this.#at(name), FOLDER_FLAGS).catch(async (error: unknown) => {
      const errno = errnoOf(error);
      if (errno !== "ENOTDIR" && errno !== "ELOOP") throw error;
      const found = await this.look(name).catch(() => undefined);
      throw new FileProblem(
        found?.kind === "link" ? "it is a symbolic link, not a directory" : "it is not a directory",
      );
    });
    return await Folder.#of(this.pathOf(name), handle);
  }

  /** Creates a directory that only its owner may enter; false if something already has the name. */
  async makeFolder(name: string): Promise<boolean> {
    try {
      await mkdir(this.#at(name), { mode: FOLDER_MODE });
      return true;
    } catch (error) {
      if (errnoOf(error) === "EEXIST") return false;
      throw error;
    }
  }

  /** Names, in no particular order. */
  async list(): Promise<string[]> {
    return await readdir(this.#self);
  }

  /** What has the name; undefined if nothing does. */
  async look(name: Name): Promise<FolderEntry | undefined> {
    const found = await lstat(this.#at(name), { bigint: true }).catch((error: unknown) => {
      if (errnoOf(error) === "ENOENT") return undefined;
      throw error;
    });
    if (found === undefined) return undefined;
    const kind = found.isFile() ? "file" : found.isDirectory() ? "folder" : found.isSymbolicLink() ? "link" : "other";
    return {
      kind,
      dev: found.dev,
      ino: found.ino,
      sizeBytes: Number(found.size),
      occupiedBytes: Number(found.blocks) * BLOCK_BYTES,
      mtimeMs: Number(found.mtimeNs) / 1e6,
      links: Number(found.nlink),
    };
  }

  /** Opens a regular file for reading. @throws FileProblem if it is a link or not a regular file; the system's error */
  async openFile(name: string): Promise<RegularFile> {
    return await toRegularFile(this.pathOf(name), () => open(this.#at(name), READ_FLAGS));
  }

  /** The same, for reading and writing in place. */
  async openForUpdate(name: string): Promise<RegularFile> {
    const flags = constants.O_RDWR | constants.O_NOFOLLOW | constants.O_NONBLOCK;
    return await toRegularFile(this.pathOf(name), () => open(this.#at(name), flags));
  }

  /** Reads a whole small file. @throws as openFile() and readWhole() */
  async readFile(name: string, maxBytes: number): Promise<Buffer> {
    await using file = await this.openFile(name);
    return await readWhole(file, maxBytes);
  }

  /** Creates a file that only its owner may use; the name must be free. */
  async createFile(name: string): Promise<FileHandle> {
    return await open(this.#at(name), CREATE_FLAGS, FILE_MODE);
  }

  /** Renames `from` to `to`, in this or another directory; replaces what has that name. */
  async rename(from: string, target: Folder, to: string): Promise<void> {
    await rename(this.#at(from), target.#at(to));
  }

  /** Gives a file a second name; fails with EEXIST if that name is taken. */
  async link(from: string, to: string): Promise<void> {
    await link(this.#at(from), this.#at(to));
  }

  /** Removes a name that is not a directory's; what it leads to stays. False if the name did not exist. */
  async removeFile(name: Name): Promise<boolean> {
    return await isDone(unlink(this.#at(name)));
  }

  /**
   * Removes whatever has the name, with its contents. Every directory on the way is opened without following links and
   * emptied through its descriptor. Something that cannot be removed does not keep the rest from being removed.
   *
   * @throws the first error
   */
  async remove(name: string): Promise<void> {
    await this.#remove(name, 0);
  }

  async #remove(name: Name, depth: number): Promise<void> {
    const found = await this.look(name);
    if (found === undefined) return;
    if (found.kind !== "folder") return void (await this.removeFile(name));
    if (depth >= MAX_DEPTH) throw new FileProblem(`"${this.pathOf(name)}" is nested too deeply, remove it by hand`);
    await this.#empty(name, depth);
    await isDone(rmdir(this.#at(name)));
  }

  async #empty(name: Name, depth: number): Promise<void> {
    await using folder = await this.openFolder(name);
    if (folder.identity.dev !== this.identity.dev) {
      throw new FileProblem(`"${folder.path}" is on another file system, remove it by hand`);
    }
    let first: { readonly error: unknown } | undefined;
    for (const entry of await readdir(folder.#self, { encoding: "buffer" })) {
      await folder.#remove(entry, depth + 1).catch((error: unknown) => {
        first ??= { error };
      });
    }
    if (first !== undefined) throw first.error;
  }

  /** Makes added, changed and removed names durable. */
  async sync(): Promise<void> {
    await this.#handle.sync();
  }

  /** Whether `name` is this very `folder` or file. */
  async isNamed(name: string, identity: FileIdentity): Promise<boolean> {
    const found = await this.look(name);
    return found !== undefined && isSameFile(found, identity);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#handle.close().catch(() => undefined); // closed twice
  }

  get #self(): string {
    if (this.#handle.fd < 0) throw new Error(`"${this.path}" is closed`);
    return `/proc/self/fd/${this.#handle.fd}`;
  }

  #at(name: Name): string | Buffer {
    const text = typeof name === "string" ? name : name.toString("latin1");
    if (text === "" || text === "." || text === ".." || text.includes("/") || text.includes("\0")) {
      throw new TypeError(`${JSON.stringify(text)} is not a name in a folder`);
    }
    return typeof name === "string" ? `${this.#self}/${name}` : Buffer.concat([Buffer.from(`${this.#self}/`), name]);
  }
}

async function isDone(removal: Promise<void>): Promise<boolean> {
  try {
    await removal;
    return true;
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return false;
    throw error;
  }
}
