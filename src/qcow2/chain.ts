// SPDX-License-Identifier: AGPL-3.0-or-later
// A disk as the guest saw it: an image over its backing images, each given as an open file. Names in
// headers are never opened.
import { MIB, RequestError } from "../core/index.ts";
import type { RegularFile } from "../host/index.ts";
import { Qcow2FormatError } from "./errors.ts";
import type { Qcow2Header } from "./header.ts";
import { Qcow2Image } from "./image.ts";

/** A longer chain is a mistake: every image costs a file handle and its L1 table. */
const MAX_CHAIN_IMAGES = 1024;
/** All L1 tables of a chain together: 256 images of a 64 TiB disk, with 64 KiB clusters. */
const MAX_CHAIN_L1_BYTES = 256 * MIB;

export class Qcow2Chain {
  readonly #images: readonly Qcow2Image[];

  private constructor(images: readonly Qcow2Image[]) {
    this.#images = images;
  }

  /**
   * Reads a chain, top image first, base last. The files are borrowed: the caller closes them.
   *
   * @param known headers of these very files, if they were read already
   * @throws Qcow2FormatError if an image is unsound or appears twice, if the L1 tables are too large, if an image
   *   before the last has no backing file or gives it a format other than qcow2, or if the last one has a backing
   *   file; EnvironmentError if one cannot be read
   */
  static async over(
    files: readonly RegularFile[],
    signal: AbortSignal,
    known: readonly Qcow2Header[] = [],
  ): Promise<Qcow2Chain> {
    if (files.length === 0 || files.length > MAX_CHAIN_IMAGES) {
      throw new RequestError(`Cannot open a chain of ${files.length} images: expected 1 to ${MAX_CHAIN_IMAGES}`);
    }
    const images: Qcow2Image[] = [];
    const seen = new Set<string>();
    let l1Bytes = 0;
    for (const [index, file] of files.entries()) {
      const { path } = file;
      signal.throwIfAborted();
      const image = await Qcow2Image.over(file, known[index]);
      const { dev, ino } = await file.handle.stat({ bigint: true });
      if (seen.has(`${dev}:${ino}`)) throw new Qcow2FormatError(`Cannot open chain: "${path}" comes twice in it`);
      seen.add(`${dev}:${ino}`);
      checkLink(path, image.header, index === files.length - 1);
      l1Bytes += image.l1Bytes;
      if (l1Bytes > MAX_CHAIN_L1_BYTES) {
        throw new Qcow2FormatError(`Cannot open chain: with "${path}" its L1 tables have ${l1Bytes} bytes, too many`);
      }
      images.push(image);
    }
    return new Qcow2Chain(images);
  }

  /** Size of the disk: that of the top image. */
  get virtualBytes(): number {
    return this.#images[0]?.header.virtualBytes ?? 0;
  }

  /** Headers, top first. */
  get headers(): readonly Qcow2Header[] {
    return this.#images.map((image) => image.header);
  }

  /**
   * Fills `target` with the guest's bytes from `guestOffset` on. Beyond the end of the disk, and beyond
   * the end of a smaller backing image, there are zeroes.
   *
   * @throws Qcow2FormatError if a table or a compressed cluster is damaged, EnvironmentError if reading fails
   */
  async read(guestOffset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    await this.#read(0, guestOffset, target, signal);
  }

  async #read(depth: number, offset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    const image = this.#images[depth];
    const virtualBytes = image?.header.virtualBytes ?? 0;
    const inside = Math.max(0, Math.min(target.length, virtualBytes - offset));
    target.fill(0, inside);
    if (image === undefined || inside === 0) return;
    for await (const run of image.runs(offset, inside, signal)) {
      const part = target.subarray(run.offset - offset, run.offset - offset + run.length);
      if (run.entry.kind === "unallocated") await this.#read(depth + 1, run.offset, part, signal);
      else if (run.entry.kind === "zero") part.fill(0);
      else await image.readRun(run, part);
    }
  }
}

/** A missing image would read as zeroes, so the header must agree on whether there is one below. */
function checkLink(path: string, { backing }: Qcow2Header, isLast: boolean): void {
  if (isLast && backing !== undefined) {
    throw new Qcow2FormatError(
      `Cannot open chain: "${path}" is its last image but has a backing file "${backing.file}"`,
    );
  }
  if (!isLast && backing === undefined) {
    throw new Qcow2FormatError(`Cannot open chain: "${path}" has no backing file, but is not its last image`);
  }
  if (backing?.format !== undefined && backing.format !== "qcow2") {
    throw new Qcow2FormatError(`Cannot open chain: "${path}" has a backing file of format "${backing.format}"`);
  }
}
