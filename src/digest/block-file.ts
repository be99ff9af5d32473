// SPDX-License-Identifier: AGPL-3.0-or-later
// Reads a file of block digests: finds the records of a range of clusters. Each page is checked when it is read, so that
// what is found is what was written; a file that is damaged says so.
import { FileProblem, type RegularFile, readInto } from "../host/index.ts";
import {
  type BlockHeader,
  type BlockRecord,
  clusterOf,
  decodeHeader,
  decodeRecord,
  PAGE_BYTES,
  readPageHead,
} from "./block-format.ts";
import type { ClusterDigester } from "./cluster-digest.ts";

/** Pages that are read at once, and how many of these windows are kept: a reader goes through a disk in order. */
const WINDOW_PAGES = 8;
const MAX_WINDOWS = 4;

interface Page {
  readonly bytes: Buffer;
  readonly count: number;
}

export class BlockDigestFile {
  readonly header: BlockHeader;
  readonly digester: ClusterDigester;
  readonly #file: RegularFile;
  /** Pages with records: 1 to this number. */
  readonly #lastPage: number;
  readonly #windows = new Map<number, Promise<Page[]>>();
  /** The page in which the last record was found: the next question is nearly always about the same one. */
  #recent = 1;

  private constructor(file: RegularFile, header: BlockHeader, digester: ClusterDigester) {
    this.#file = file;
    this.header = header;
    this.digester = digester;
    this.#lastPage = file.fileBytes / PAGE_BYTES - 1;
  }

  /**
   * @param file borrowed for as long as this is used
   * @throws FileProblem if it is not a complete file of block digests; the system's error
   */
  static async open(file: RegularFile): Promise<BlockDigestFile> {
    if (file.fileBytes < 2 * PAGE_BYTES || file.fileBytes % PAGE_BYTES !== 0) {
      throw new FileProblem("it is not a complete file of block digests");
    }
    const page = Buffer.alloc(PAGE_BYTES);
    await readInto(file.handle, page, 0);
    const { header, digester } = decodeHeader(page);
    const found = new BlockDigestFile(file, header, digester);
    await readInto(file.handle, page, file.fileBytes - PAGE_BYTES);
    const { isLast } = readPageHead(page, found.#lastPage, digester);
    if (!isLast) throw new FileProblem("it is not a complete file of block digests");
    return found;
  }

  /**
   * Calls `visit` for each record that has clusters from `first` on, `count` of them, in ascending order.
   *
   * @throws FileProblem if a page is damaged; the system's error
   */
  async find(first: number, count: number, visit: (record: BlockRecord) => void): Promise<void> {
    const end = first + count;
    const start = await this.#pageBefore(first);
    for (let number = start; number <= this.#lastPage; number++) {
      const { bytes, count: records } = await this.#page(number);
      let index = number === start ? lastAtOrBefore(bytes, records, first) : 0;
      for (; index < records; index++) {
        if (clusterOf(bytes, index) >= end) return;
        this.#recent = number;
        const record = decodeRecord(bytes, index);
        if (record.cluster + record.count > first) visit(record);
      }
    }
  }

  /** The last page whose first record begins at `cluster` or before it; page 1 if there is none. */
  async #pageBefore(cluster: number): Promise<number> {
    if (await this.#isIn(this.#recent, cluster)) return this.#recent;
    if (this.#recent < this.#lastPage && (await this.#isIn(this.#recent + 1, cluster))) return this.#recent + 1;
    let low = 1;
    let high = this.#lastPage;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if ((await this.#firstOf(middle)) <= cluster) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  async #isIn(number: number, cluster: number): Promise<boolean> {
    if ((await this.#firstOf(number)) > cluster) return false;
    return number === this.#lastPage || (await this.#firstOf(number + 1)) > cluster;
  }

  /** Only the last page can be without records; it ends every search. */
  async #firstOf(number: number): Promise<number> {
    const { bytes, count } = await this.#page(number);
    return count === 0 ? Number.POSITIVE_INFINITY : clusterOf(bytes, 0);
  }

  async #page(number: number): Promise<Page> {
    const window = Math.floor(number / WINDOW_PAGES);
    let pages = this.#windows.get(window);
    if (pages === undefined) {
      pages = this.#readWindow(window);
      pages.catch(() => undefined); // reported to those who wait for it
    } else {
      this.#windows.delete(window);
    }
    this.#windows.set(window, pages); // the most recent one is last
    const oldest = this.#windows.keys().next().value;
    if (this.#windows.size > MAX_WINDOWS && oldest !== undefined) this.#windows.delete(oldest);
    const page = (await pages)[number % WINDOW_PAGES];
    if (page === undefined) throw new FileProblem("it became shorter while it was read");
    return page;
  }

  async #readWindow(window: number): Promise<Page[]> {
    const first = window * WINDOW_PAGES;
    const count = Math.min(WINDOW_PAGES, this.#lastPage + 1 - first);
    const bytes = Buffer.alloc(count * PAGE_BYTES);
    if ((await readInto(this.#file.handle, bytes, first * PAGE_BYTES)) < bytes.length) {
      throw new FileProblem("it became shorter while it was read");
    }
    return Array.from({ length: count }, (_, index) => {
      const page = bytes.subarray(index * PAGE_BYTES, (index + 1) * PAGE_BYTES);
      return { bytes: page, count: readPageHead(page, first + index, this.digester).count };
    });
  }
}

/** Index of the last record that begins at `cluster` or before it; 0 if there is none. */
function lastAtOrBefore(page: Buffer, count: number, cluster: number): number {
  let low = 0;
  let high = Math.max(0, count - 1);
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (clusterOf(page, middle) <= cluster) low = middle;
    else high = middle - 1;
  }
  return low;
}
