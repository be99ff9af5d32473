// SPDX-License-Identifier: AGPL-3.0-or-later
// The program that unpacks a compressed archive, chosen by what the file begins with, not by its name.
import { read } from "node:fs";
import type { FileHandle } from "node:fs/promises";
import { promisify } from "node:util";
import { ChildProcessError } from "../core/index.ts";
import { ChildProcess, readerFlags } from "../host/index.ts";
import { tryCreatePipe } from "./pipe.ts";

const MAGIC_BYTES = 4;
const DRAIN_BYTES = 64 * 1024;
const readSome = promisify(read);
/** RFC 1952, "ID1, ID2"; RFC 8878, "Magic_Number" (little-endian 0xFD2FB528). */
const GZIP_MAGIC = "1f8b";
const ZSTD_MAGIC = "28b52ffd";

type CompressionFormat = "gzip" | "zstd";

/** A running decompressor whose output another child reads. */
interface Decompressor extends AsyncDisposable {
  readonly tool: ChildProcess;
  /** For the stdin of the reader. */
  readonly output: number;
  /** Reads on to the end when the reader has had enough: its checksum stands there. */
  drain(): Promise<void>;
}

/** @returns undefined for a file that is not compressed */
export async function readCompressionFormat(file: FileHandle): Promise<CompressionFormat | undefined> {
  const bytes = Buffer.alloc(MAGIC_BYTES);
  const { bytesRead } = await file.read(bytes, 0, MAGIC_BYTES, 0);
  const magic = bytes.subarray(0, bytesRead).toString("hex");
  if (magic === ZSTD_MAGIC) return "zstd";
  return magic.startsWith(GZIP_MAGIC) ? "gzip" : undefined;
}

/** Starts the decompressor of `format` on `file` (from its start), writing to `output` or to its `stdout`. */
export async function startUnpacker(
  format: CompressionFormat,
  file: FileHandle,
  output: number | "pipe",
): Promise<ChildProcess> {
  const setprivFlags = await readerFlags();
  return await ChildProcess.start(format, ["-d", "-c", "-q"], { cwd: "/", stdio: [file.fd, output], setprivFlags });
}

/** @returns undefined for a file that is not compressed: read it itself */
export async function startDecompressor(file: FileHandle, path: string): Promise<Decompressor | undefined> {
  const format = await readCompressionFormat(file);
  if (format === undefined) return undefined;
  const pipe = tryCreatePipe();
  if (pipe === undefined) {
    throw new ChildProcessError(`Cannot list ${JSON.stringify(path)}: a pipe cannot be created (koffi is missing)`);
  }
  try {
    const tool = await startUnpacker(format, file, pipe.writeFd);
    pipe.closeWriteEnd();
    return {
      tool,
      output: pipe.readFd,
      drain: () => drain(pipe.readFd),
      async [Symbol.asyncDispose]() {
        await tool[Symbol.asyncDispose](); // a read under way ends with it
        pipe[Symbol.dispose]();
      },
    };
  } catch (error) {
    pipe[Symbol.dispose]();
    throw error;
  }
}

async function drain(fd: number): Promise<void> {
  const buffer = Buffer.alloc(DRAIN_BYTES);
  while ((await readSome(fd, buffer, 0, DRAIN_BYTES, null)).bytesRead > 0);
}
