// SPDX-License-Identifier: AGPL-3.0-or-later
// The messages between the compressor and its workers. The data itself stays in shared memory.

export type CompressionKind = "zlib" | "zstd";

/** `workerData` of a worker. */
export interface WorkerSetup {
  readonly kind: CompressionKind;
  /** The memory for every result, and for inputs that were not shared before. */
  readonly memory: SharedArrayBuffer;
  /** File URL that koffi is resolved from. */
  readonly base: string;
}

/** One run of whole clusters. */
export interface CompressJob {
  readonly id: number;
  /** undefined: the input is in the worker's memory. */
  readonly input: SharedArrayBuffer | undefined;
  readonly inputOffset: number;
  readonly inputBytes: number;
  readonly clusterBytes: number;
  /** Where the streams go, one after another, in the worker's memory; as long as the input. */
  readonly outputOffset: number;
}

export type WorkerMessage =
  | { readonly ready: true }
  /** The worker cannot work at all. */
  | { readonly broken: string }
  /** Length of each cluster's stream in bytes; 0 if compression does not make it smaller. */
  | { readonly id: number; readonly sizes: readonly number[] }
  | { readonly id: number; readonly error: string };
