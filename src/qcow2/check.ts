// SPDX-License-Identifier: AGPL-3.0-or-later
// Checks the tables of an image as `qemu-img check` does: every reference must match the refcounts, lie
// inside the file, and not overlap another owner. Streamed; the window of clusters bounds the memory.
import { UnsupportedError } from "../core/index.ts";
import type { RegularFile } from "../host/index.ts";
import { RecordedRefcounts } from "./check-refcounts.ts";
import { type CheckReport, ErrorList } from "./check-report.ts";
import { ReferenceWindow, WINDOW_CLUSTERS } from "./check-window.ts";
import { TABLE_ENTRY_BYTES } from "./constants.ts";
import { Qcow2FormatError } from "./errors.ts";
import { readTable } from "./file-io.ts";
import type { Qcow2Header } from "./header.ts";
import { readQcow2Header } from "./read-header.ts";
import { decodeL1Entry, decodeL2Entry, type L2Entry } from "./tables.ts";

export interface CheckOptions {
  readonly signal: AbortSignal;
  /** Called now and then with the fraction that is done, 0 to 1. */
  readonly onProgress?: (part: number) => void;
  /** The header of this very file, if it was read already. */
  readonly header?: Qcow2Header;
  /** Clusters per pass; for tests. */
  readonly windowClusters?: number;
}

/** With more errors than this, a check is not worth the time. */
const MAX_ERRORS = 1000;

/**
 * Checks the tables of one open image; reads neither its data nor its backing file.
 *
 * @throws Qcow2FormatError if the header, L1 table or refcount table is unusable; UnsupportedError for an image with
 *   internal snapshots or bitmaps, whose clusters we do not count; EnvironmentError if reading fails
 */
export async function checkQcow2(file: RegularFile, options: CheckOptions): Promise<CheckReport> {
  const header = options.header ?? (await readQcow2Header(file));
  if (header.snapshots > 0 || header.hasBitmaps) {
    throw new UnsupportedError(`Cannot check "${file.path}": it holds internal snapshots or bitmaps`);
  }
  const errors = new ErrorList();
  const refcounts = await RecordedRefcounts.open(file, header, errors);
  const l1 = await readTable(file, header.l1Offset, header.l1Entries * TABLE_ENTRY_BYTES);
  const check = new Check(file, header, refcounts, l1, errors, options);
  const fileClusters = Math.ceil(file.fileBytes / header.clusterBytes);
  const step = options.windowClusters ?? WINDOW_CLUSTERS;
  const first = new ReferenceWindow(0, Math.min(step, fileClusters));
  await check.pass(first, fileClusters);
  // A file may be a hole of exabytes: where nothing is counted and nothing is referred to, nothing can be wrong.
  const further = new Set([...refcounts.windows(step), ...first.windowsBeyond]);
  for (const start of [...further].map((window) => window * step).sort((a, b) => a - b)) {
    if (start === 0 || start >= fileClusters || errors.count > MAX_ERRORS) continue;
    await check.pass(new ReferenceWindow(start, Math.min(start + step, fileClusters)), fileClusters);
  }
  return {
    errors: errors.errors,
    errorCount: errors.count,
    leakedClusters: check.leakedClusters,
    ...check.counts,
    fileBytes: file.fileBytes,
  };
}

class Check {
  leakedClusters = 0;
  readonly counts = { dataClusters: 0, compressedClusters: 0, zeroClusters: 0 };
  readonly #file: RegularFile;
  readonly #header: Qcow2Header;
  readonly #refcounts: RecordedRefcounts;
  readonly #l1: Buffer;
  readonly #errors: ErrorList;
  readonly #options: CheckOptions;
  #window = new ReferenceWindow(0, 0);

  constructor(
    file: RegularFile,
    header: Qcow2Header,
    refcounts: RecordedRefcounts,
    l1: Buffer,
    errors: ErrorList,
    options: CheckOptions,
  ) {
    this.#file = file;
    this.#header = header;
    this.#refcounts = refcounts;
    this.#l1 = l1;
    this.#errors = errors;
    this.#options = options;
  }

  /** Counts all references to the clusters of `window`; the first pass also checks what needs no counting. */
  async pass(window: ReferenceWindow, fileClusters: number): Promise<void> {
    const { clusterBytes, l1Offset, refcountTableOffset, refcountTableClusters } = this.#header;
    this.#window = window;
    this.#own(0, 1, "the header");
    this.#own(l1Offset, Math.ceil(this.#l1.length / clusterBytes), "the L1 table");
    this.#own(refcountTableOffset, refcountTableClusters, "the refcount table");
    for (const offset of this.#refcounts.blockOffsets) if (offset > 0) this.#own(offset, 1, "a refcount block");
    for (let index = 0; index < this.#l1.length / TABLE_ENTRY_BYTES; index++) {
      const at = index * TABLE_ENTRY_BYTES;
      if (this.#l1.readUInt32BE(at) === 0 && this.#l1.readUInt32BE(at + 4) === 0) continue;
      if (this.#errors.count > MAX_ERRORS) return;
      await this.#checkL2(index);
      this.#options.onProgress?.(Math.min(1, (window.start + index) / fileClusters));
    }
    await this.#compare();
  }

  /** True in the pass that reports what is independent of the window. */
  get #isFirst(): boolean {
    return this.#window.start === 0;
  }

  async #checkL2(index: number): Promise<void> {
    const raw = this.#l1.readBigUInt64BE(index * TABLE_ENTRY_BYTES);
    const { clusterBytes, version } = this.#header;
    const entry = this.#decode(`L1 entry ${index}`, () => decodeL1Entry(raw, clusterBytes));
    if (entry === undefined || entry.l2Offset === 0) return;
    if (!this.#isInside(entry.l2Offset, clusterBytes, `L2 table ${index}`)) return;
    // A cluster with another owner is not a table: what would be read from it means nothing.
    if (!this.#own(entry.l2Offset, 1, `L2 table ${index}`)) return;
    await this.#checkCopied(entry.l2Offset, entry.isCopied, `L2 table ${index}`);
    this.#options.signal.throwIfAborted();
    const table = await readTable(this.#file, entry.l2Offset, clusterBytes);
    for (let at = 0; at < table.length; at += TABLE_ENTRY_BYTES) {
      if (table.readUInt32BE(at) === 0 && table.readUInt32BE(at + 4) === 0) continue;
      const what = (): string => `cluster ${at / TABLE_ENTRY_BYTES} of L2 table ${index}`;
      const decoded = this.#decode(what, () => decodeL2Entry(table.readBigUInt64BE(at), clusterBytes, version));
      if (decoded !== undefined) await this.#checkEntry(decoded, what);
    }
  }

  async #checkEntry(entry: L2Entry, what: () => string): Promise<void> {
    const { clusterBytes } = this.#header;
    if (this.#isFirst) this.#countKind(entry);
    if (entry.kind === "unallocated" || (entry.kind === "zero" && entry.hostOffset === 0)) return;
    if (!this.#isInside(entry.hostOffset, 1, what)) return;
    if (entry.kind !== "compressed") {
      this.#own(entry.hostOffset, 1, what);
      await this.#checkCopied(entry.hostOffset, entry.isCopied, what);
      return;
    }
    const last = Math.floor((entry.hostOffset + entry.length - 1) / clusterBytes);
    for (let cluster = Math.floor(entry.hostOffset / clusterBytes); cluster <= last; cluster++) {
      if (!this.#isInside(cluster * clusterBytes, 1, what)) return;
      if (!this.#window.addShared(cluster)) this.#overlap(cluster, what);
    }
  }

  #countKind(entry: L2Entry): void {
    if (entry.kind === "data") this.counts.dataClusters++;
    else if (entry.kind === "compressed") this.counts.compressedClusters++;
    else if (entry.kind === "zero") this.counts.zeroClusters++;
  }

  /** Claims clusters for one owner; false if any of them already has one. */
  #own(offset: number, clusters: number, what: string | (() => string)): boolean {
    const first = offset / this.#header.clusterBytes;
    let isFree = true;
    for (let cluster = first; cluster < first + clusters; cluster++) {
      if (this.#window.addExclusive(cluster)) continue;
      this.#overlap(cluster, what);
      isFree = false;
    }
    return isFree;
  }

  #overlap(cluster: number, what: string | (() => string)): void {
    this.#errors.add(`${textOf(what)} lies in host cluster ${cluster}, which is in use already`);
  }

  #isInside(offset: number, length: number, what: string | (() => string)): boolean {
    const { fileBytes } = this.#file;
    if (offset + length <= fileBytes) return true;
    if (this.#isFirst) this.#errors.add(`${textOf(what)} at ${offset} is outside the file of ${fileBytes} bytes`);
    return false;
  }

  /** "Copied" promises that the refcount is exactly one: QEMU writes in place if it is set. */
  async #checkCopied(offset: number, isCopied: boolean, what: string | (() => string)): Promise<void> {
    const cluster = offset / this.#header.clusterBytes;
    if (cluster < this.#window.start || cluster >= this.#window.end) return;
    const refcount = this.#refcounts.count(await this.#refcounts.block(cluster), cluster);
    if ((refcount === 1) !== isCopied) {
      this.#errors.add(`${textOf(what)} has refcount ${refcount}, its copied flag says ${isCopied ? "1" : "not 1"}`);
    }
  }

  async #compare(): Promise<void> {
    const { start, end } = this.#window;
    const perBlock = this.#refcounts.clustersPerBlock;
    for (let at = start; at < end; ) {
      this.#options.signal.throwIfAborted();
      const block = await this.#refcounts.block(at);
      const blockEnd = Math.min(end, (Math.floor(at / perBlock) + 1) * perBlock);
      for (; at < blockEnd; at++) {
        const refcount = this.#refcounts.count(block, at);
        const references = this.#window.references(at);
        if (refcount > references) this.leakedClusters++;
        else if (refcount < references) {
          this.#errors.add(`host cluster ${at} has refcount ${refcount}, but ${references} references`);
        }
      }
    }
  }

  /** A damaged entry is an error of the image, not of the check. */
  #decode<T>(what: string | (() => string), decode: () => T): T | undefined {
    try {
      return decode();
    } catch (error) {
      if (!(error instanceof Qcow2FormatError)) throw error;
      if (this.#isFirst) this.#errors.add(`${textOf(what)}: ${error.message}`);
      return undefined;
    }
  }
}

function textOf(what: string | (() => string)): string {
  return typeof what === "string" ? what : what();
}
