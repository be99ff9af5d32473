// SPDX-License-Identifier: AGPL-3.0-or-later
// A worker thread that compresses clusters. It is bundled into a separate file; compressor.ts starts it
// from that file's text, so that nothing is loaded later.
import { createRequire } from "node:module";
import { parentPort, workerData } from "node:worker_threads";
import { deflateRawSync } from "node:zlib";
import type Koffi from "koffi";
import type { CompressJob, WorkerMessage, WorkerSetup } from "./compress-protocol.ts";
import { ZLIB_WINDOW_BITS } from "./constants.ts";

/** QEMU uses 6: 4 takes two thirds of the time for one percent more size (64 KiB clusters, 4 KiB window). */
const ZLIB_LEVEL = 4;
const ZLIB_MEMORY_LEVEL = 9;
/** QEMU streams at level 3: one call per cluster at 2 gives one percent more size in three quarters of the time. */
const ZSTD_LEVEL = 2;

/** Compresses `input` to the start of `output`; 0 if the stream would not be shorter than `input`. */
type Codec = (input: Buffer, output: Buffer) => number;

/** Fills the young generation; see collectGarbage(). */
const LITTER_ENTRIES = 2048;
let litter: readonly number[] = [];

/**
 * Node's zlib leaves its result outside the JavaScript heap, where V8 lets some 32 MiB pile up per worker before it
 * collects. It also collects when the young generation (1 MiB, see compressor.ts) is full, so this fills it.
 */
function collectGarbage(): void {
  litter = new Array<number>(LITTER_ENTRIES).fill(litter.length);
}

const zlibCodec: Codec = (input, output) => {
  collectGarbage();
  const stream = deflateRawSync(input, {
    level: ZLIB_LEVEL,
    windowBits: ZLIB_WINDOW_BITS,
    memLevel: ZLIB_MEMORY_LEVEL,
    chunkSize: Math.max(64, input.length / 2), // most streams fit, and it is garbage immediately afterwards
  });
  return stream.length < input.length ? stream.copy(output) : 0;
};

/** Source: zstd.h, "Simple API" with an explicit context. */
function loadZstdCodec(base: string): Codec {
  const koffi = createRequire(base)("koffi") as typeof Koffi;
  const library = koffi.load("libzstd.so.1");
  const createContext = library.func("void *ZSTD_createCCtx()");
  const isError = library.func("unsigned int ZSTD_isError(size_t code)");
  const compress = library.func(
    "size_t ZSTD_compressCCtx(void *cctx, void *dst, size_t capacity, const void *src, size_t length, int level)",
  );
  const context: unknown = createContext();
  return (input, output) => {
    // The output is one byte shorter than the input: a stream that does not fit is stored uncompressed.
    const code: unknown = compress(context, output, input.length - 1, input, input.length, ZSTD_LEVEL);
    return isError(code) !== 0 ? 0 : Number(code);
  };
}

function run(job: CompressJob, codec: Codec, memory: SharedArrayBuffer): number[] {
  const input = Buffer.from(job.input ?? memory, job.inputOffset, job.inputBytes);
  const output = Buffer.from(memory, job.outputOffset, job.inputBytes);
  const sizes: number[] = [];
  let used = 0;
  for (let at = 0; at < input.length; at += job.clusterBytes) {
    const size = codec(input.subarray(at, at + job.clusterBytes), output.subarray(used, used + job.clusterBytes));
    sizes.push(size);
    used += size;
  }
  return sizes;
}

function start(setup: WorkerSetup, send: (message: WorkerMessage) => void): void {
  let codec: Codec;
  try {
    codec = setup.kind === "zstd" ? loadZstdCodec(setup.base) : zlibCodec;
  } catch (error) {
    send({ broken: String(error) });
    return;
  }
  parentPort?.on("message", (job: CompressJob) => {
    try {
      send({ id: job.id, sizes: run(job, codec, setup.memory) });
    } catch (error) {
      send({ id: job.id, error: String(error) });
    }
  });
  send({ ready: true });
}

start(workerData as WorkerSetup, (message) => parentPort?.postMessage(message));
