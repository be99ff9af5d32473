// SPDX-License-Identifier: AGPL-3.0-or-later
// A file that only grows: digested in file order, written with O_DIRECT where the file system has it,
// several writes in flight. Its first 64 KiB come last.
import { constants } from "node:fs";
import { type FileHandle, open, rm } from "node:fs/promises";
import {
  AlignedPool,
  type Digest,
  type Digester,
  preferredDigest,
  type Slot,
  tryCreateDigester,
} from "../block/index.ts";
import { environmentError, errnoOf, KIB, MIB } from "../core/index.ts";
import { HEAD_BYTES } from "./constants.ts";
import { writeFully } from "./file-io.ts";

/** What O_DIRECT asks of memory, offset and length; fits every disk in use. */
const DIRECT_ALIGNMENT = 4096;
const STAGE_BYTES = MIB;
const STAGE_SLOTS = 4;
/** Below this a copy into the stage costs less than a write of its own. */
const MIN_BORROWED_BYTES = 256 * KIB;

/** What append() took over: `released` settles when its bytes are the caller's again. */
export interface Appended {
  readonly released: Promise<void>;
}

interface InFlight {
  readonly end: number;
  isDone: boolean;
}

const DONE = Promise.resolve();

/** Owner of a new file. Calls of append() must not overlap: the caller has an order anyway. */
export class AppendFile implements AsyncDisposable {
  readonly path: string;
  readonly #handle: FileHandle;
  #direct: FileHandle | undefined;
  readonly #digester: Digester;
  readonly #pool = new AlignedPool(STAGE_BYTES, STAGE_SLOTS);
  readonly #signal: AbortSignal;
  readonly #inFlight: InFlight[] = [];
  readonly #writes = new Set<Promise<void>>();
  #stage: Slot | undefined;
  #stageUsed = 0;
  #position = HEAD_BYTES;
  #writtenBelow = HEAD_BYTES;
  #failure: { readonly error: unknown } | undefined;
  #isFinished = false;
  #isDisposed = false;

  private constructor(path: string, handle: FileHandle, direct: FileHandle | undefined, signal: AbortSignal) {
    this.path = path;
    this.#handle = handle;
    this.#direct = direct;
    this.#signal = signal;
    const digester = tryCreateDigester(preferredDigest());
    if (digester === undefined) throw new Error("unreachable: the preferred digest exists");
    this.#digester = digester;
  }

  /**
   * Creates `path`, mode 0600; it must not exist.
   *
   * @param isAligned every append ends at a multiple of 4096 whenever a borrowed one follows, and so does the file
   * @throws EnvironmentError if it exists or cannot be created
   */
  static async create(path: string, isAligned: boolean, signal: AbortSignal): Promise<AppendFile> {
    let handle: FileHandle;
    try {
      handle = await open(path, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600);
    } catch (error) {
      throw environmentError("create", path, error);
    }
    // Opened apart: a file system without O_DIRECT may create the file and then refuse it.
    const direct = isAligned
      ? await open(path, constants.O_WRONLY | constants.O_DIRECT).catch(() => undefined)
      : undefined;
    return new AppendFile(path, handle, direct, signal);
  }

  /** Where the next byte goes. */
  get position(): number {
    return this.#position;
  }

  /** Every byte below has reached the file. */
  get writtenBelow(): number {
    return this.#writtenBelow;
  }

  /**
   * Appends `bytes`: large page-aligned shared memory is borrowed, anything else copied.
   *
   * @throws the first error of any write before, or the abort reason
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

  /** Sends what the stage holds on its way; nobody has to wait. */
  flush(): void {
    const stage = this.#stage;
    if (stage === undefined) return;
    this.#stage = undefined;
    const bytes = stage.bytes.subarray(0, this.#stageUsed);
    this.#stageUsed = 0;
    this.#write(bytes, this.#position - bytes.length).then(stage.release, stage.release);
  }

  /**
   * Writes the head after everything else is safely on the disk. The digest covers the bytes from
   * 65536 to the end, then the first 65536.
   */
  async finish(head: Buffer): Promise<Digest> {
    this.flush();
    await Promise.allSettled(this.#writes);
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

  /** Remembers the first error of all; returns it. */
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

  /** Starts a write; digests at once, because calls come in file order. */
  #write(bytes: Buffer, offset: number): Promise<void> {
    this.#digester.update(bytes);
    const entry: InFlight = { end: offset + bytes.length, isDone: false };
    this.#inFlight.push(entry);
    const write = this.#writeOut(bytes, offset).then(
      () => this.#settle(entry),
      (error: unknown) => {
        throw this.#fail(error);
      },
    );
    this.#writes.add(write);
    const forget = (): void => void this.#writes.delete(write);
    write.then(forget, forget);
    return write;
  }

  async #writeOut(bytes: Buffer, offset: number): Promise<void> {
    const direct = this.#direct;
    if (direct === undefined || bytes.length % DIRECT_ALIGNMENT !== 0 || offset % DIRECT_ALIGNMENT !== 0) {
      return await writeFully(this.#handle, bytes, offset);
    }
    try {
      await writeFully(direct, bytes, offset);
    } catch (error) {
      // Refused by the file system, or the rest of a short write is not aligned: once more, buffered.
      if (errnoOf(error) !== "EINVAL") throw error;
      await writeFully(this.#handle, bytes, offset);
    }
  }

  #settle(entry: InFlight): void {
    entry.isDone = true;
    for (let first = this.#inFlight[0]; first?.isDone === true; first = this.#inFlight[0]) {
      this.#writtenBelow = first.end;
      this.#inFlight.shift();
    }
  }

  async #close(): Promise<void> {
    this.#pool[Symbol.dispose]();
    const direct = this.#direct;
    this.#direct = undefined;
    await direct?.close();
    await this.#handle.close();
  }

  /** Without finish(): waits for writes in flight, whose memory is borrowed, and deletes the file. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isFinished || this.#isDisposed) return;
    this.#isDisposed = true;
    this.#failure ??= { error: new Error(`"${this.path}" is closed`) };
    this.#stage?.release();
    this.#stage = undefined;
    await Promise.allSettled(this.#writes);
    // Unlink first: that works on an open file, and a failing close must not keep the partial one.
    try {
      await rm(this.path, { force: true });
    } finally {
      await this.#close();
    }
  }
}
