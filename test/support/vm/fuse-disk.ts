// SPDX-License-Identifier: AGPL-3.0-or-later
// A file on a real FUSE mount: nbdfuse on nbdkit, as vzdump uses nbdfuse on QEMU.
import { type FileHandle, writeFile } from "node:fs/promises";
import type { TestContext } from "vitest";
import { LabFileHandle } from "../../../fixtures/lab/index.ts";
import { FuseFile } from "../../../src/source/fuse-file.ts";
import { type NbdServer, type ScratchFolder, scratchFolder, startNbdServer } from "../nbd/nbd-servers.ts";
import { requireTool } from "../programs/tools.ts";

const DEVICE = "drive-scsi0";
const never = new AbortController().signal;

/** `content` as a FUSE file, and a handle on it as vzdump has one. `filter`: of nbdkit, with its options. */
export class FuseDisk implements AsyncDisposable {
  readonly #folder: ScratchFolder;
  readonly #server: NbdServer;
  readonly #file: LabFileHandle;

  private constructor(folder: ScratchFolder, server: NbdServer, file: LabFileHandle) {
    this.#folder = folder;
    this.#server = server;
    this.#file = file;
  }

  static async start(content: Buffer, filter?: string, ...options: string[]): Promise<FuseDisk> {
    const folder = await scratchFolder();
    const [socket, file] = [folder.file("sock"), folder.file("content")];
    await writeFile(file, content);
    const filters = filter === undefined ? [] : [`--filter=${filter}`];
    const args = ["-f", "-U", socket, ...filters, "file", file, ...options];
    const server = await startNbdServer({ transport: "unix", path: socket }, "nbdkit", args);
    const volume = { size: content.length, "bitmap-mode": "none", "nbd-path": socket } as const;
    return new FuseDisk(folder, server, await LabFileHandle.open(DEVICE, volume));
  }

  get handle(): FileHandle {
    return this.#file.handle;
  }

  /** The file's path. */
  get path(): string {
    return this.#file.file;
  }

  /** Holds the mount, and everything else that belongs to it. */
  get dir(): string {
    return this.#folder.path;
  }

  open(silenceMs = 20_000): Promise<FuseFile> {
    return FuseFile.open(DEVICE, this.#file.reference, silenceMs, never);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const held of [this.#file, this.#server, this.#folder]) await held[Symbol.asyncDispose]();
  }
}

export function requireFuseTools(context: TestContext): void {
  requireTool(context, "nbdkit", "nbdfuse", "nbdinfo", "fusermount3");
}
