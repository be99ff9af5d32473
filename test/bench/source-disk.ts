// SPDX-License-Identifier: AGPL-3.0-or-later
// The disk that is backed up: raw, on tmpfs, runs of real files' bytes between holes, served by qemu-nbd.
import { type FileHandle, open, readdir, readFile, stat } from "node:fs/promises";
import path from "node:path";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { GIB, MIB } from "../../src/core/index.ts";
import { startServer } from "./processes.ts";

export const DEVICE = "drive-scsi0";
/** Real files compress as real disks do. Read in sorted order, so that every run has the same bytes. */
const FILES_ROOT = "/usr";
const MAX_FILE_BYTES = 256 * MIB;
const CONNECTIONS = 16;

export interface SourceDisk extends AsyncDisposable {
  readonly path: string;
  readonly sizeBytes: number;
  /** Without the holes. */
  readonly dataBytes: number;
  readonly socket: string;
  /** For tools that know NBD URIs. */
  readonly uri: string;
}

/** `runs` runs of `runBytes` of data, one at every multiple of `strideBytes`. */
interface DiskShape {
  readonly sizeBytes: number;
  readonly runBytes: number;
  readonly strideBytes: number;
  readonly runs: number;
}

/** 4 GiB, of which 2 GiB are data. */
export const PLAIN_DISK: DiskShape = { sizeBytes: 4 * GIB, runBytes: 64 * MIB, strideBytes: 128 * MIB, runs: 32 };
/** 16 TiB, of which 1 GiB is data; each run belongs to an L2 table of its own. */
export const HUGE_DISK: DiskShape = { sizeBytes: 16 * 1024 * GIB, runBytes: MIB, strideBytes: 16 * GIB, runs: 1024 };

export async function makeSourceDisk(dir: string, name: string, shape: DiskShape): Promise<SourceDisk> {
  const file = path.join(dir, `${name}.raw`);
  await fillDisk(file, shape);
  const socket = path.join(dir, `${name}.sock`);
  const server = await startServer(
    "qemu-nbd",
    ["-r", "-t", "-f", "raw", "-e", `${CONNECTIONS}`, "-x", DEVICE, "-k", socket, file],
    () => exists(socket),
  );
  return {
    path: file,
    sizeBytes: shape.sizeBytes,
    dataBytes: shape.runs * shape.runBytes,
    socket,
    uri: `nbd+unix:///${DEVICE}?socket=${encodeURIComponent(socket)}`,
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
}

export async function exists(file: string): Promise<boolean> {
  return await stat(file).then(
    () => true,
    () => false,
  );
}

async function fillDisk(file: string, shape: DiskShape): Promise<void> {
  const handle = await open(file, "wx", 0o600);
  try {
    await handle.truncate(shape.sizeBytes);
    const content = new RunWriter(handle, shape);
    for await (const name of filesBelow(FILES_ROOT)) {
      await content.take(await readFile(name).catch(() => Buffer.alloc(0)));
      if (content.isComplete) return;
    }
    // A small system: the rest does not compress.
    for (let seed = 1; !content.isComplete; seed++) await content.take(seededBytes(seed, MIB));
  } finally {
    await handle.close();
  }
}

/** Lays a stream of bytes into the runs of a disk. */
class RunWriter {
  readonly #handle: FileHandle;
  readonly #shape: DiskShape;
  #doneBytes = 0;

  constructor(handle: FileHandle, shape: DiskShape) {
    this.#handle = handle;
    this.#shape = shape;
  }

  get isComplete(): boolean {
    return this.#doneBytes === this.#shape.runs * this.#shape.runBytes;
  }

  async take(bytes: Buffer): Promise<void> {
    const { runBytes, strideBytes } = this.#shape;
    for (let done = 0; done < bytes.length && !this.isComplete; ) {
      const within = this.#doneBytes % runBytes;
      const offset = Math.floor(this.#doneBytes / runBytes) * strideBytes + within;
      const length = Math.min(bytes.length - done, runBytes - within);
      const { bytesWritten } = await this.#handle.write(bytes, done, length, offset);
      done += bytesWritten;
      this.#doneBytes += bytesWritten;
    }
  }
}

async function* filesBelow(folder: string): AsyncGenerator<string, void, undefined> {
  const entries = await readdir(folder, { withFileTypes: true }).catch(() => []);
  for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const name = path.join(folder, entry.name);
    if (entry.isDirectory()) yield* filesBelow(name);
    else if (entry.isFile() && (await stat(name)).size <= MAX_FILE_BYTES) yield name;
  }
}
