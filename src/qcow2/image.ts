// SPDX-License-Identifier: AGPL-3.0-or-later
// One image, open for reading: its header, its L1 table, and where each guest cluster lives.
import { alignDown } from "../core/index.ts";
import type { RegularFile } from "../host/index.ts";
import { TABLE_ENTRY_BYTES } from "./constants.ts";
import { decompressCluster } from "./decompress.ts";
import { Qcow2FormatError } from "./errors.ts";
import { readExactly, readTable, readUpTo } from "./file-io.ts";
import type { Qcow2Header } from "./header.ts";
import { readQcow2Header } from "./read-header.ts";
import { decodeL1Entry, decodeL2Entry, type L2Entry, l2CoverageBytes } from "./tables.ts";

/** The size of the L2 tables of one image that stay in memory, in bytes. */
const L2_CACHE_BYTES = 1024 * 1024;
const MIN_CACHED_TABLES = 2;

/** A guest range of one kind: data is contiguous in the file; a compressed range lies within its cluster. */
interface ImageRun {
  readonly offset: number;
  readonly length: number;
  readonly entry: L2Entry;
}

export class Qcow2Image {
  readonly header: Qcow2Header;
  readonly file: RegularFile;
  readonly #l1: Buffer;
  readonly #l2Bytes: number;
  /** In order of use: the first is the least recently used. */
  readonly #tables = new Map<number, Buffer>();
  readonly #maxTables: number;
  #lastCluster: { readonly hostOffset: number; readonly bytes: Buffer } | undefined;

  private constructor(file: RegularFile, header: Qcow2Header, l1: Buffer) {
    this.file = file;
    this.header = header;
    this.#l1 = l1;
    this.#l2Bytes = l2CoverageBytes(header.clusterBytes);
    this.#maxTables = Math.max(MIN_CACHED_TABLES, Math.floor(L2_CACHE_BYTES / header.clusterBytes));
  }

  /**
   * Reads the header and the L1 table. The file is borrowed: the caller closes it.
   *
   * @param known the header of this very file, if it was read already
   * @throws EnvironmentError if the file cannot be read, Qcow2FormatError if it is not a sound plain image
   */
  static async over(file: RegularFile, known?: Qcow2Header): Promise<Qcow2Image> {
    const header = known ?? (await readQcow2Header(file));
    const entries = Math.ceil(header.virtualBytes / l2CoverageBytes(header.clusterBytes));
    const l1 = await readTable(file, header.l1Offset, entries * TABLE_ENTRY_BYTES);
    return new Qcow2Image(file, header, l1);
  }

  /** How much memory the L1 table takes. */
  get l1Bytes(): number {
    return this.#l1.length;
  }

  /** Cuts [offset, offset + length), which must be inside the disk, into runs of one kind. */
  async *runs(offset: number, length: number, signal: AbortSignal): AsyncGenerator<ImageRun, void, undefined> {
    const end = offset + length;
    const { clusterBytes } = this.header;
    let held: ImageRun | undefined;
    for (let at = offset; at < end; ) {
      const entry = await this.#entry(at, signal);
      const next = Math.min(end, alignDown(at, clusterBytes) + clusterBytes);
      if (held !== undefined && continues(held, entry, clusterBytes)) {
        held = { offset: held.offset, length: next - held.offset, entry: held.entry };
      } else {
        if (held !== undefined) yield held;
        held = { offset: at, length: next - at, entry };
      }
      at = next;
    }
    if (held !== undefined) yield held;
  }

  /** Fills `target` with the data of a run of kind "data" or "compressed". */
  async readRun(run: ImageRun, target: Buffer): Promise<void> {
    const within = run.offset % this.header.clusterBytes;
    if (run.entry.kind === "data") {
      await readExactly(this.file, target, run.entry.hostOffset + within);
    } else if (run.entry.kind === "compressed") {
      const cluster = await this.#decompress(run.entry.hostOffset, run.entry.length);
      cluster.copy(target, 0, within, within + target.length);
    }
  }

  async #decompress(hostOffset: number, length: number): Promise<Buffer> {
    const last = this.#lastCluster;
    if (last?.hostOffset === hostOffset) return last.bytes;
    const stream = Buffer.alloc(length);
    // QEMU may end the file where the stream ends, before the end of its last sector.
    const got = await readUpTo(this.file, stream, hostOffset);
    const bytes = Buffer.alloc(this.header.clusterBytes);
    try {
      decompressCluster(this.header.compression, stream.subarray(0, got), bytes);
    } catch (error) {
      if (!(error instanceof Qcow2FormatError)) throw error;
      throw new Qcow2FormatError(`Cannot read "${this.file.path}" at byte ${hostOffset}: ${error.message}`, {
        cause: error,
      });
    }
    this.#lastCluster = { hostOffset, bytes };
    return bytes;
  }

  async #entry(guestOffset: number, signal: AbortSignal): Promise<L2Entry> {
    const index = Math.floor(guestOffset / this.#l2Bytes);
    const table = this.#tables.get(index) ?? (await this.#loadTable(index, signal));
    if (table === undefined) return { kind: "unallocated" };
    const { clusterBytes, version } = this.header;
    const at = Math.floor((guestOffset % this.#l2Bytes) / clusterBytes) * TABLE_ENTRY_BYTES;
    return decodeL2Entry(table.readBigUInt64BE(at), clusterBytes, version);
  }

  async #loadTable(index: number, signal: AbortSignal): Promise<Buffer | undefined> {
    signal.throwIfAborted();
    const { clusterBytes } = this.header;
    const { l2Offset } = decodeL1Entry(this.#l1.readBigUInt64BE(index * TABLE_ENTRY_BYTES), clusterBytes);
    if (l2Offset === 0) return undefined;
    const table = await readTable(this.file, l2Offset, clusterBytes);
    this.#tables.set(index, table);
    for (const oldest of this.#tables.keys()) {
      if (this.#tables.size <= this.#maxTables) break;
      this.#tables.delete(oldest);
    }
    return table;
  }
}

/** True if `entry`, of the cluster right after `run`, extends it. */
function continues(run: ImageRun, entry: L2Entry, clusterBytes: number): boolean {
  if (run.entry.kind !== entry.kind || entry.kind === "compressed") return false;
  if (entry.kind !== "data" || run.entry.kind !== "data") return true;
  const start = alignDown(run.offset, clusterBytes);
  return run.entry.hostOffset + (run.offset + run.length - start) === entry.hostOffset;
}
