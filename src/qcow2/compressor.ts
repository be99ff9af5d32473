// SPDX-License-Identifier: AGPL-3.0-or-later
// Compresses clusters on all cores: a pool of worker threads over shared memory, made once per job.
import { readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { fileURLToPath } from "node:url";
import { Worker } from "node:worker_threads";
import { AlignedPool } from "../block/index.ts";
import { EnvironmentError, MIB, oneLine } from "../core/index.ts";
import type { CompressionKind, CompressJob, WorkerMessage, WorkerSetup } from "./compress-protocol.ts";

/** The maximum number of bytes in one compress() call. */
export const MAX_COMPRESS_BYTES = MIB;
/** Each worker costs about 10 MiB, and all of Node must stay below 200 MiB. QEMU stops at 4. */
const MAX_WORKERS = 6;
/** A worker produces much short-lived garbage and keeps nothing: a small young generation bounds it. */
const WORKER_LIMITS = { maxYoungGenerationSizeMb: 1, maxOldGenerationSizeMb: 64 };
/** Results that wait for their turn in the file, in addition to those in progress. */
const SPARE_SLOTS = 4;

/** The result of one compress() call; `bytes` is borrowed until release(). */
export interface CompressedRun {
  /** Stream length of each cluster in bytes; 0 means: store it uncompressed. */
  readonly sizes: readonly number[];
  /** The streams, one after another. */
  readonly bytes: Buffer;
  release(): void;
}

/** All writers of a job share it. */
export interface ClusterCompressor extends AsyncDisposable {
  readonly kind: CompressionKind;
  /** A worker failed: every later compress() fails, too. Dispose it and create another. */
  readonly hasFailed: boolean;
  /**
   * Compresses up to 1 MiB of clusters; a short last one counts as padded with zeroes.
   * `bytes` is borrowed until the promise settles; shared memory is not copied.
   *
   * @throws EnvironmentError if a worker has failed, or the abort reason
   */
  compress(bytes: Buffer, clusterBytes: number, signal: AbortSignal): Promise<CompressedRun>;
}

interface Pending {
  resolve(sizes: readonly number[]): void;
  reject(error: unknown): void;
}

/** A worker and its jobs. */
interface Member {
  readonly worker: Worker;
  readonly pending: Map<number, Pending>;
}

/**
 * Starts the workers and waits until each has its codec.
 *
 * @throws EnvironmentError if the worker file is missing, or, for "zstd", libzstd
 */
export async function createCompressor(
  kind: CompressionKind,
  workers = Math.min(MAX_WORKERS, availableParallelism()),
): Promise<ClusterCompressor> {
  const pool = new WorkerPool(kind, workers);
  try {
    await pool.whenReady();
  } catch (error) {
    await pool[Symbol.asyncDispose]();
    throw error;
  }
  return pool;
}

class WorkerPool implements ClusterCompressor {
  readonly kind: CompressionKind;
  /** Per slot: room for an input that is not shared, then for the output. */
  readonly #slots: AlignedPool;
  readonly #members: Member[] = [];
  readonly #ready: Array<Promise<void>> = [];
  #failure: EnvironmentError | undefined;
  #isDisposed = false;
  #nextId = 0;

  constructor(kind: CompressionKind, workers: number) {
    this.kind = kind;
    this.#slots = new AlignedPool(2 * MAX_COMPRESS_BYTES, workers + SPARE_SLOTS);
    const workerData: WorkerSetup = { kind, memory: this.#slots.memory, base: import.meta.url };
    const text = workerText();
    for (let index = 0; index < workers; index++) {
      this.#add(new Worker(text, { eval: true, workerData, resourceLimits: WORKER_LIMITS, name: `compress-${kind}` }));
    }
  }

  get hasFailed(): boolean {
    return this.#failure !== undefined;
  }

  async whenReady(): Promise<void> {
    await Promise.all(this.#ready);
  }

  async compress(bytes: Buffer, clusterBytes: number, signal: AbortSignal): Promise<CompressedRun> {
    if (bytes.length > MAX_COMPRESS_BYTES) throw new RangeError(`Cannot compress ${bytes.length} bytes at once`);
    const slot = await this.#slots.acquire(signal);
    try {
      const slotOffset = slot.bytes.byteOffset;
      const inputBytes = Math.ceil(bytes.length / clusterBytes) * clusterBytes;
      const shared: ArrayBufferLike = bytes.buffer;
      const isShared = shared instanceof SharedArrayBuffer && inputBytes === bytes.length;
      if (!isShared) slot.bytes.fill(0, bytes.copy(slot.bytes), inputBytes);
      const sizes = await this.#run({
        id: this.#nextId++,
        input: isShared ? shared : undefined,
        inputOffset: isShared ? bytes.byteOffset : slotOffset,
        inputBytes,
        clusterBytes,
        outputOffset: slotOffset + MAX_COMPRESS_BYTES,
      });
      return { sizes, bytes: slot.bytes.subarray(MAX_COMPRESS_BYTES), release: slot.release };
    } catch (error) {
      slot.release();
      throw error;
    }
  }

  #run(job: CompressJob): Promise<readonly number[]> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (this.#isDisposed) return Promise.reject(new Error("the compressor is closed"));
    const member = this.#members.reduce((best, other) => (other.pending.size < best.pending.size ? other : best));
    return new Promise((resolve, reject) => {
      member.pending.set(job.id, { resolve, reject });
      member.worker.postMessage(job);
    });
  }

  #add(worker: Worker): void {
    const member: Member = { worker, pending: new Map() };
    this.#members.push(member);
    const ready = new Promise<void>((resolve, reject) => {
      const fail = (why: string): void => reject(this.#fail(why));
      worker.on("message", (message: WorkerMessage) => {
        if ("ready" in message) resolve();
        else if ("broken" in message) reject(this.#fail(message.broken, brokenError(this.kind, message.broken)));
        else this.#settle(member, message);
      });
      worker.on("error", (error) => fail(String(error)));
      worker.on("exit", (code) => fail(`it ended with code ${code}`));
    });
    ready.catch(() => undefined); // whenReady() reports it; later failures reach compress()
    this.#ready.push(ready);
  }

  #settle(member: Member, message: { id: number; sizes: readonly number[] } | { id: number; error: string }): void {
    const pending = member.pending.get(message.id);
    member.pending.delete(message.id);
    if ("error" in message) pending?.reject(this.#fail(message.error));
    else pending?.resolve(message.sizes);
  }

  /** The first failure of any worker ends the pool: nothing can replace a missing cluster. */
  #fail(why: string, error = new EnvironmentError(`Cannot compress: a worker failed: ${oneLine(why)}`)): unknown {
    this.#failure ??= error;
    for (const { pending } of this.#members) {
      for (const job of pending.values()) job.reject(this.#failure);
      pending.clear();
    }
    return this.#failure;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isDisposed) return;
    this.#isDisposed = true;
    await Promise.all(this.#members.map(({ worker }) => worker.terminate()));
    this.#slots[Symbol.dispose](); // not earlier: a worker may have written there until now
  }
}

function brokenError(kind: CompressionKind, why: string): EnvironmentError {
  if (kind !== "zstd") return new EnvironmentError(`Cannot compress with ${kind}: ${oneLine(why)}`);
  return new EnvironmentError(`Cannot compress with zstd: libzstd.so.1 does not load (${oneLine(why)})`, {
    hint: "install the package libzstd1, or set dir-compression to zlib",
  });
}

let loadedText: string | undefined;

/** Next to the running bundle, or in dist/ when running from the sources. Read once. */
function workerText(): string {
  if (loadedText !== undefined) return loadedText;
  const paths = ["./compress-worker.cjs", "../../dist/compress-worker.cjs"].map((at) =>
    fileURLToPath(new URL(at, import.meta.url)),
  );
  for (const path of paths) {
    try {
      loadedText = readFileSync(path, "utf8");
      return loadedText;
    } catch {
      // try the next place
    }
  }
  throw new EnvironmentError(`Cannot start compression: "${paths[0]}" is missing, the installation is incomplete`);
}
