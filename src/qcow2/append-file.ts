// SPDX-License-Identifier: AGPL-3.0-or-later
// A file that only grows: digested in file order, written with O_DIRECT where the file system has it. Its
// first 64 KiB come last. One write is in flight at a time, with everything that waits by then: a file system
// lets only one write extend a file, and several at once use up a core waiting for each other.
import { constants } from "node:fs";
import type { FileHandle } from "node:fs/promises";
import { AlignedPool, type Slot } from "../block/index.ts";
import { environmentError, errnoOf, KIB, MIB } from "../core/index.ts";
import { type Digest, type Digester, preferredDigest, tryCreateDigester } from "../digest/index.ts";
import { type NewFile, reopen } from "../host/index.ts";
import { HEAD_BYTES } from "./constants.ts";
import { writeAllFully, writeFully } from "./file-io.ts";

/** The alignment that O_DIRECT requires of memory, offset and length; fits every disk in use. */
const DIRECT_ALIGNMENT = 4096;
const STAGE_BYTES = MIB;
const STAGE_SLOTS = 4;
/** Longest write; whatever waits beyond this goes with the next write. */
const MAX_WRITE_BYTES = 8 * MIB;
/** Below this, a copy into the stage costs less than a separate write. */
const MIN_BORROWED_BYTES = 256 * KIB;

/** What append() has accepted: `released` settles when the bytes belong to the caller again. */
export interface Appended {
  readonly released: Promise<void>;
}

/** A piece on its way to the file; the pieces in the queue follow each other without gaps. */
interface Queued {
  readonly bytes: Buffer;
  readonly offset: number;
  settle(failure: { readonly error: unknown } | undefined): void;
}

const DONE = Promise.resolve();

/** Owns a new file. Calls of append() must not overlap: the caller has an order anyway. */
export class AppendFile implements AsyncDisposable {
  readonly path: string;
  readonly #file: NewFile;
  readonly #handle: FileHandle;
  #direct: FileHandle | undefined;
  readonly #digester: Digester;
  readonly #pool = new AlignedPool(STAGE_BYTES, STAGE_SLOTS);
  readonly #signal: AbortSignal;
  readonly #queue: Queued[] = [];
  /** Writes the queue until it is empty; never rejects. */
  #pump: Promise<void> | undefined;
  #stage: Slot | undefined;
  #stageUsed = 0;
  #position = HEAD_BYTES;
  #writtenBelow = HEAD_BYTES;
  #failure: { readonly error: unknown } | undefined;
  #isFinished = false;
  #isDisposed = false;

  private constructor(file: NewFile, handle: FileHandle, direct: FileHandle | undefined, signal: AbortSignal) {
    this.path = file.path;
    this.#file = file;
    this.#handle = handle;
    this.#direct = direct;
    this.#signal = signal;
    const digester = tryCreateDigester(preferredDigest());
    if (digester === undefined) throw new Error("unreachable: the preferred digest exists");
    this.#digester = digester;
  }

  /**
   * Creates the file; it must not exist.
   *
   * @param isAligned every append that a borrowed one follows ends at a multiple of 4096, and so does the file
   * @throws EnvironmentError if it exists or cannot be created
   */
  static async create(file: NewFile, isAligned: boolean, signal: AbortSignal): Promise<AppendFile> {
    const handle = await file.create().catch((error: unknown) => {
      throw environmentError("create", file.path, error);
    });
    // Opened separately: a file system without O_DIRECT may create the file and then refuse to open it.
    const direct = isAligned
      ? await reopen(handle, constants.O_WRONLY | constants.O_DIRECT).catch(() => undefined)
      : undefined;
    return new AppendFile(file, handle, direct, signal);
  }

  /** Where the next byte goes. */
  get position(): number {
    return this.#position;
  }

  /** Every byte below this has reached the file. */
  get writtenBelow(): number {
    return this.#writtenBelow;
  }

  /**
   * Appends `bytes`: borrows large page-aligned shared memory, copies anything else.
   *
   * @throws the first error of any earlier write, or the abort reason
   */
  async append(bytes: Buffer): Promise<Appended> {
    this.#check();
    if (this.#isBorrowable(bytes)) {
      this.flush();
      const offset = this.#position;
      this.#position += bytes.length;
      return { released: this.#write(bytes, offset) };
    }
    for (let done = 0; done < bytes.length; ) {
      this.#stage ??= await this.#acquireStage();
      const copied = bytes.copy(this.#stage.bytes, this.#stageUsed, done);
      done += copied;
      this.#stageUsed += copied;
      this.#position += copied;
      if (this.#stageUsed === this.#stage.bytes.length) this.flush();
    }
    return { released: DONE };
  }

  /** Appends zeroes up to a multiple of `alignment`. */
  async pad(alignment: number): Promise<void> {
    const missing = (alignment - (this.#position % alignment)) % alignment;
    if (missing > 0) await this.append(Buffer.alloc(missing));
  }

  /** Sends what the stage holds on its way, without waiting for it. */
  flush(): void {
    const stage = this.#stage;
    if (stage === undefined) return;
    this.#stage = undefined;
    const bytes = stage.bytes.subarray(0, this.#stageUsed);
    this.#stageUsed = 0;
    this.#write(bytes, this.#position - bytes.length).then(stage.release, stage.release);
  }

  /**
   * Writes the head once everything else is safely on the disk. The digest covers the bytes from
   * 65536 to the end, then the first 65536.
   */
  async finish(head: Buffer): Promise<Digest> {
    this.flush();
    await this.#pump;
    this.#check();
    try {
      await this.#handle.sync();
      this.#signal.throwIfAborted();
      await writeFully(this.#handle, head, 0);
      await this.#handle.sync();
      await this.#close();
    } catch (error) {
      throw this.#fail(error);
    }
    this.#digester.update(head);
    this.#isFinished = true;
    return this.#digester.finish();
  }

  /** Records the first of all errors and returns it. */
  #fail(error: unknown): unknown {
    this.#failure ??= {
      error: this.#signal.aborted ? this.#signal.reason : environmentError("write", this.path, error),
    };
    return this.#failure.error;
  }

  #check(): void {
    if (this.#failure !== undefined) throw this.#failure.error;
    this.#signal.throwIfAborted();
  }

  async #acquireStage(): Promise<Slot> {
    const slot = await this.#pool.acquire(this.#signal);
    if (this.#failure === undefined) return slot;
    slot.release();
    throw this.#failure.error;
  }

  #isBorrowable(bytes: Buffer): boolean {
    return (
      bytes.length >= MIN_BORROWED_BYTES &&
      bytes.length % DIRECT_ALIGNMENT === 0 &&
      bytes.byteOffset % DIRECT_ALIGNMENT === 0 &&
      this.#position % DIRECT_ALIGNMENT === 0 &&
      (bytes.buffer as ArrayBufferLike) instanceof SharedArrayBuffer
    );
  }

  /** Queues a write; digests at once, because calls come in file order. */
  #write(bytes: Buffer, offset: number): Promise<void> {
    this.#digester.update(bytes);
    return new Promise((resolve, reject) => {
      const settle: Queued["settle"] = (failure) => (failure === undefined ? resolve() : reject(failure.error));
      this.#queue.push({ bytes, offset, settle });
      this.#pump ??= this.#writeQueue();
    });
  }

  async #writeQueue(): Promise<void> {
    for (let batch = this.#takeBatch(); batch.length > 0; batch = this.#takeBatch()) {
      const [first] = batch;
      const last = batch.at(-1);
      try {
        if (this.#failure === undefined && first !== undefined && last !== undefined) {
          await this.#writeOut(
            batch.map(({ bytes }) => bytes),
            first.offset,
          );
          this.#writtenBelow = last.offset + last.bytes.length;
        }
      } catch (error) {
        this.#fail(error);
      }
      for (const { settle } of batch) settle(this.#failure);
    }
    this.#pump = undefined;
  }

  /** The pieces that go into one write: contiguous, and either all fit for O_DIRECT or a single one that is not. */
  #takeBatch(): Queued[] {
    const isDirect = ({ bytes, offset }: Queued): boolean =>
      bytes.length % DIRECT_ALIGNMENT === 0 && offset % DIRECT_ALIGNMENT === 0;
    let bytes = 0;
    let count = 0;
    for (const piece of this.#queue) {
      bytes += piece.bytes.length;
      if (count > 0 && (bytes > MAX_WRITE_BYTES || !isDirect(piece))) break;
      count++;
      if (!isDirect(piece)) break;
    }
    return this.#queue.splice(0, count);
  }

  async #writeOut(pieces: readonly Buffer[], offset: number): Promise<void> {
    const direct = this.#direct;
    const length = pieces.reduce((sum, { length }) => sum + length, 0);
    if (direct === undefined || length % DIRECT_ALIGNMENT !== 0 || offset % DIRECT_ALIGNMENT !== 0) {
      return await writeAllFully(this.#handle, pieces, offset);
    }
    try {
      await writeAllFully(direct, pieces, offset);
    } catch (error) {
      // The file system refused, or the rest of a short write is not aligned: try once more, buffered.
      if (errnoOf(error) !== "EINVAL") throw error;
      await writeAllFully(this.#handle, pieces, offset);
    }
  }

  async #close(): Promise<void> {
    this.#pool[Symbol.dispose]();
    const direct = this.#direct;
    this.#direct = undefined;
    try {
      await direct?.close();
    } finally {
      await this.#handle.close();
    }
  }

  /** Without finish(): waits for writes in flight, because their memory is borrowed, and deletes the file. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isFinished || this.#isDisposed) return;
    this.#isDisposed = true;
    this.#failure ??= { error: new Error(`"${this.path}" is closed`) };
    this.#stage?.release();
    this.#stage = undefined;
    await this.#pump;
    // Unlink first: that works on an open file, and a failing close must not leave the partial file behind.
    try {
      await this.#file.remove();
    } finally {
      await this.#close();
    }
  }
}
