// SPDX-License-Identifier: AGPL-3.0-or-later
// Writes a file of block digests, in guest order, while its image is written. Memory: some chunks of 1 MiB, whatever the
// size of the disk.
import type { FileHandle } from "node:fs/promises";
import { environmentError, MIB } from "../core/index.ts";
import type { NewFile } from "../host/index.ts";
import {
  type BlockHeader,
  encodeHeader,
  encodeRecord,
  PAGE_BYTES,
  RECORDS_PER_PAGE,
  sealPage,
} from "./block-format.ts";
import { CLUSTER_DIGEST_BYTES, type ClusterDigester } from "./cluster-digest.ts";
import { type Digest, type Digester, preferredDigest, tryCreateDigester } from "./digest.ts";

const CHUNK_BYTES = MIB;

/** `await using`: without finish() the file is removed. After a failure every call rejects with that first error. */
export class BlockDigestWriter implements AsyncDisposable {
  readonly #file: NewFile;
  readonly #handle: FileHandle;
  readonly #digester: ClusterDigester;
  readonly #fileDigester: Digester;
  #chunk = Buffer.alloc(CHUNK_BYTES);
  /** Bytes of the chunk that are complete pages. */
  #chunkUsed = 0;
  #pageNumber = 1;
  #recordCount = 0;
  #nextCluster = 0;
  #position = 0;
  /** Settles when every full chunk so far is in the file; rejects with the first failure. */
  #written: Promise<void> = Promise.resolve();
  #isOver = false;

  private constructor(file: NewFile, handle: FileHandle, digester: ClusterDigester, fileDigester: Digester) {
    this.#file = file;
    this.#handle = handle;
    this.#digester = digester;
    this.#fileDigester = fileDigester;
  }

  /** @throws EnvironmentError if the file exists or cannot be created */
  static async create(file: NewFile, header: BlockHeader, digester: ClusterDigester): Promise<BlockDigestWriter> {
    const fileDigester = tryCreateDigester(preferredDigest());
    if (fileDigester === undefined) throw new Error("unreachable: the preferred digest exists");
    const handle = await file.create().catch((error: unknown) => {
      throw environmentError("create", file.path, error);
    });
    const writer = new BlockDigestWriter(file, handle, digester, fileDigester);
    encodeHeader(header, digester).copy(writer.#chunk, 0);
    writer.#chunkUsed = PAGE_BYTES;
    return writer;
  }

  /**
   * Digests of consecutive clusters of data. Calls come in guest order and may overlap in time; `digests` is copied. The
   * promise keeps the caller from getting far ahead of the file.
   */
  async addData(cluster: number, digests: Buffer): Promise<void> {
    const count = digests.length / CLUSTER_DIGEST_BYTES;
    this.#accept(cluster, count);
    for (let index = 0; index < count; index++) {
      this.#record(cluster + index, { digests, at: index * CLUSTER_DIGEST_BYTES });
    }
    await this.#written;
  }

  /** A run of clusters that the image says are zero; in the same order. */
  async addZeroes(cluster: number, count: number): Promise<void> {
    this.#accept(cluster, count);
    this.#record(cluster, { zeroes: count });
    await this.#written;
  }

  /** Makes the file complete and durable. @returns its size and its digest, in plain order */
  async finish(): Promise<{ readonly fileBytes: number; readonly digest: Digest }> {
    this.#seal(true);
    this.#queueChunk();
    await this.#written;
    try {
      await this.#handle.sync();
      await this.#handle.close(); // some file systems report a full disk only now
    } catch (error) {
      throw environmentError("write", this.#file.path, error);
    }
    this.#isOver = true;
    return { fileBytes: this.#position, digest: this.#fileDigester.finish() };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isOver) return;
    this.#isOver = true;
    await this.#written.catch(() => undefined);
    this.#fileDigester.finish(); // frees its state
    // Unlink first: that works on an open file, and a failing close must not leave the partial file behind.
    try {
      await this.#file.remove();
    } finally {
      await this.#handle.close();
    }
  }

  #accept(cluster: number, count: number): void {
    if (cluster < this.#nextCluster || count < 1) {
      throw new Error(`cluster ${cluster} is not in guest order: expected ${this.#nextCluster} or later`);
    }
    this.#nextCluster = cluster + count;
  }

  /** Where a page is full, the page is sealed; where the chunk is, it is queued. */
  #record(cluster: number, content: Parameters<typeof encodeRecord>[3]): void {
    if (this.#recordCount === RECORDS_PER_PAGE) {
      this.#seal(false);
      if (this.#chunkUsed === CHUNK_BYTES) this.#queueChunk();
    }
    encodeRecord(this.#page(), this.#recordCount++, cluster, content);
  }

  #page(): Buffer {
    return this.#chunk.subarray(this.#chunkUsed, this.#chunkUsed + PAGE_BYTES);
  }

  #seal(isLast: boolean): void {
    sealPage(this.#page(), { number: this.#pageNumber++, count: this.#recordCount, isLast }, this.#digester);
    this.#chunkUsed += PAGE_BYTES;
    this.#recordCount = 0;
  }

  #queueChunk(): void {
    const bytes = this.#chunk.subarray(0, this.#chunkUsed);
    this.#chunk = Buffer.alloc(CHUNK_BYTES);
    this.#chunkUsed = 0;
    const offset = this.#position;
    this.#position += bytes.length;
    this.#fileDigester.update(bytes);
    this.#written = this.#written.then(() => this.#write(bytes, offset));
    this.#written.catch(() => undefined); // reported to every call from now on
  }

  async #write(bytes: Buffer, offset: number): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      const { bytesWritten } = await this.#handle
        .write(bytes, done, bytes.length - done, offset + done)
        .catch((error: unknown) => {
          throw environmentError("write", this.#file.path, error);
        });
      done += bytesWritten;
    }
  }
}
