// SPDX-License-Identifier: AGPL-3.0-or-later
// Single files out of a tar, with tar-stream: nothing of the archive reaches the file system.

import { once } from "node:events";
import { Readable, type Writable } from "node:stream";
import { createGunzip } from "node:zlib";
import { type Entry, extract, type Headers } from "tar-stream";
import { CleanupStack, RequestError } from "../core/index.ts";
import { type ChildProcess, openAgain, type RegularFile } from "../host/index.ts";
import { readCompressionFormat, startUnpacker } from "./decompressor.ts";
import { type SparseExtent, SparseMapReader } from "./sparse-member.ts";

export interface TarMember {
  /** As in the archive ("./etc/hostname"); bytes that are no UTF-8 show as U+FFFD. */
  readonly name: string;
  readonly type: "file" | "directory" | "symlink" | "link" | "fifo" | "block-device" | "character-device" | "other";
  /** Bytes of the file as it was, holes included. */
  readonly size: number;
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly mtimeMs: number;
  /** Target of a link. */
  readonly linkName: string | undefined;
}

/** tar-stream keeps the pax records, its types do not say so. */
type PaxHeaders = Headers & { readonly pax?: Readonly<Record<string, string>> | null };

const KNOWN_TYPES: ReadonlySet<string> = new Set([
  ...["file", "directory", "symlink", "link", "fifo", "block-device", "character-device"],
]);
const ZEROS = Buffer.alloc(64 * 1024);

/**
 * Members in the order of the archive. `file` is borrowed.
 *
 * @throws an error if it is damaged; EnvironmentError; the abort reason of `signal`
 */
export async function* listTar(file: RegularFile, signal: AbortSignal): AsyncIterable<TarMember> {
  for await (const entry of readEntries(file, signal)) {
    yield toMember(entry.header);
    entry.resume();
  }
}

/**
 * Writes the content of one regular file to `to` and ends it. "etc/hostname" and "./etc/hostname" are the same
 * name; the first member of that name is taken. `file` is borrowed.
 *
 * @throws RequestError if there is no such member, or it is no regular file or hard link to one
 */
export async function extractFile(
  file: RegularFile,
  memberName: string,
  to: Writable,
  signal: AbortSignal,
): Promise<void> {
  const target = await extractMember(file, memberName, to, signal);
  // The content is stored once, under the name that tar met first.
  if (target !== undefined && (await extractMember(file, target, to, signal)) !== undefined) {
    throw new RequestError(`Cannot extract ${JSON.stringify(memberName)}: it is a link to a link`);
  }
}

/** @returns the name that holds the content, if `memberName` is a hard link */
async function extractMember(file: RegularFile, memberName: string, to: Writable, signal: AbortSignal) {
  const wanted = plainName(memberName);
  for await (const entry of readEntries(file, signal)) {
    const member = toMember(entry.header);
    if (plainName(member.name) !== wanted) {
      entry.resume();
      continue;
    }
    if (member.type === "link" && member.linkName !== undefined) return member.linkName;
    if (member.type !== "file") throw notAFile(memberName, member);
    await copyContent(entry, member, to, signal);
    to.end();
    return undefined;
  }
  throw new RequestError(`Cannot extract ${JSON.stringify(memberName)}: the archive has no such member`);
}

async function* readEntries(archive: RegularFile, signal: AbortSignal): AsyncIterable<Entry> {
  signal.throwIfAborted();
  await using stack = new CleanupStack();
  const file = stack.use(await openAgain(archive));
  const format = await readCompressionFormat(file);
  const parser = extract();
  stack.defer(() => void parser.destroy());
  let tool: ChildProcess | undefined;
  let input: Readable = file.createReadStream({ start: 0, autoClose: false });
  if (format === "gzip") input = input.on("error", (error) => parser.destroy(error)).pipe(createGunzip());
  if (format === "zstd") {
    input.destroy();
    tool = stack.use(await startUnpacker(format, file, "pipe"));
    input = tool.stdout ?? Readable.from([]);
  }
  stack.defer(() => void input.destroy());
  const onAbort = (): void => {
    parser.destroy(signal.reason instanceof Error ? signal.reason : new Error("aborted"));
  };
  signal.addEventListener("abort", onAbort, { once: true });
  stack.defer(() => signal.removeEventListener("abort", onAbort));
  input.on("error", (error) => parser.destroy(error));
  input.pipe(parser);
  for await (const entry of parser) yield entry;
  signal.throwIfAborted();
  if (tool === undefined) return;
  await tool.exited;
  if (tool.exitCode !== 0) throw tool.failure("read", archive.path);
}

function toMember(header: PaxHeaders): TarMember {
  const pax = header.pax ?? {};
  const type = header.type ?? "other";
  return {
    name: pax["GNU.sparse.name"] ?? header.name,
    type: (KNOWN_TYPES.has(type) ? type : type === "contiguous-file" ? "file" : "other") as TarMember["type"],
    size: Number(pax["GNU.sparse.realsize"] ?? header.size ?? 0),
    mode: header.mode ?? 0,
    uid: header.uid ?? 0,
    gid: header.gid ?? 0,
    mtimeMs: header.mtime?.getTime() ?? 0,
    linkName: header.linkname ?? undefined,
  };
}

async function copyContent(entry: Entry, member: TarMember, to: Writable, signal: AbortSignal): Promise<void> {
  if ((entry.header as PaxHeaders).pax?.["GNU.sparse.major"] === undefined) {
    for await (const chunk of entry) await writeTo(to, chunk, signal);
    return;
  }
  const map = new SparseMapReader();
  let plan: SparseExtent[] | undefined;
  let writer: SparseWriter | undefined;
  for await (const chunk of entry as AsyncIterable<Buffer>) {
    if (writer !== undefined) {
      await writer.write(chunk);
      continue;
    }
    const read = map.push(chunk, member.size);
    if (read === undefined) continue;
    plan = read.extents;
    writer = new SparseWriter(plan, to, signal);
    await writer.write(read.rest);
  }
  await writer?.finish(member.size);
}

/** Puts the holes back between the data. */
class SparseWriter {
  readonly #extents: SparseExtent[];
  readonly #to: Writable;
  readonly #signal: AbortSignal;
  #position = 0;
  #index = 0;

  constructor(extents: SparseExtent[], to: Writable, signal: AbortSignal) {
    this.#extents = extents;
    this.#to = to;
    this.#signal = signal;
  }

  async write(data: Buffer): Promise<void> {
    let rest = data;
    for (let extent = this.#extents[this.#index]; extent !== undefined; extent = this.#extents[++this.#index]) {
      await this.#writeZerosUpTo(extent.offset);
      const part = rest.subarray(0, extent.offset + extent.length - this.#position);
      if (part.byteLength > 0) await writeTo(this.#to, part, this.#signal);
      this.#position += part.byteLength;
      rest = rest.subarray(part.byteLength);
      if (this.#position < extent.offset + extent.length) return;
    }
  }

  finish(fileBytes: number): Promise<void> {
    return this.#writeZerosUpTo(fileBytes);
  }

  async #writeZerosUpTo(offset: number): Promise<void> {
    while (this.#position < offset) {
      const part = ZEROS.subarray(0, offset - this.#position);
      await writeTo(this.#to, part, this.#signal);
      this.#position += part.byteLength;
    }
  }
}

async function writeTo(to: Writable, bytes: Uint8Array, signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  if (!to.write(bytes)) await once(to, "drain", { signal });
}

function plainName(name: string): string {
  return name
    .split("/")
    .filter((part) => part !== "" && part !== ".")
    .join("/");
}

function notAFile(name: string, member: TarMember): RequestError {
  const hint = member.linkName === undefined ? {} : { hint: `it points to ${JSON.stringify(member.linkName)}` };
  return new RequestError(`Cannot extract ${JSON.stringify(name)}: it is a ${member.type}, not a file`, hint);
}
