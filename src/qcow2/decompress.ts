// SPDX-License-Identifier: AGPL-3.0-or-later
// Turns compressed clusters back into bytes. A stream can never produce more than one cluster.
import { inflateRawSync } from "node:zlib";
import { EnvironmentError, messageOf } from "../core/index.ts";
import { loadNativeLibrary } from "../host/index.ts";
import type { CompressionKind } from "./compress-protocol.ts";
import { ZLIB_WINDOW_BITS } from "./constants.ts";
import { Qcow2FormatError } from "./errors.ts";

/**
 * Fills `target`, one cluster, from `stream`; ignores what follows the stream in its last sector.
 *
 * @throws Qcow2FormatError if the stream is damaged, or is longer or shorter than the cluster;
 *   EnvironmentError if this system has no libzstd
 */
export function decompressCluster(kind: CompressionKind, stream: Buffer, target: Buffer): void {
  if (kind === "zstd") zstd(stream, target);
  else zlib(stream, target);
}

function zlib(stream: Buffer, target: Buffer): void {
  let plain: Buffer;
  try {
    plain = inflateRawSync(stream, { windowBits: ZLIB_WINDOW_BITS, maxOutputLength: target.length });
  } catch (error) {
    throw new Qcow2FormatError(`Cannot decompress a zlib cluster: ${messageOf(error)}`, { cause: error });
  }
  if (plain.length !== target.length) throw wrongLength("zlib", plain.length, target.length);
  plain.copy(target);
}

interface ZstdLibrary {
  readonly frameBytes: (stream: Uint8Array, length: number) => number | bigint;
  readonly decompress: (target: Uint8Array, capacity: number, stream: Uint8Array, length: number) => number | bigint;
  readonly isError: (code: number | bigint) => number;
  readonly errorName: (code: number | bigint) => string;
}

let library: ZstdLibrary | undefined;

/** Source: zstd.h, "Simple API". */
function loadZstd(): ZstdLibrary {
  if (library === undefined) {
    const native = loadNativeLibrary("libzstd.so.1");
    if (native === undefined) {
      throw new EnvironmentError("Cannot decompress zstd clusters: libzstd.so.1 does not load", {
        hint: "install the package libzstd1",
      });
    }
    library = {
      frameBytes: native.func("size_t ZSTD_findFrameCompressedSize(const void *src, size_t length)"),
      decompress: native.func("size_t ZSTD_decompress(void *dst, size_t capacity, const void *src, size_t length)"),
      isError: native.func("unsigned int ZSTD_isError(size_t code)"),
      errorName: native.func("const char *ZSTD_getErrorName(size_t code)"),
    } as unknown as ZstdLibrary;
  }
  return library;
}

/** A cluster may consist of more than one frame; QEMU writes one. */
function zstd(stream: Buffer, target: Buffer): void {
  const zstdLibrary = loadZstd();
  const checked = (code: number | bigint): number => {
    if (zstdLibrary.isError(code) === 0) return Number(code);
    throw new Qcow2FormatError(`Cannot decompress a zstd cluster: ${zstdLibrary.errorName(code)}`);
  };
  let from = 0;
  let done = 0;
  while (done < target.length) {
    if (from >= stream.length) throw wrongLength("zstd", done, target.length);
    const rest = stream.subarray(from);
    const frameBytes = checked(zstdLibrary.frameBytes(rest, rest.length));
    const space = target.subarray(done);
    done += checked(zstdLibrary.decompress(space, space.length, rest, frameBytes));
    from += frameBytes;
  }
}

function wrongLength(kind: CompressionKind, got: number, wanted: number): Qcow2FormatError {
  return new Qcow2FormatError(`Cannot decompress a ${kind} cluster: it has ${got} bytes, expected ${wanted}`);
}
