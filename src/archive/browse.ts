// SPDX-License-Identifier: AGPL-3.0-or-later
// Single files out of a tar, with tar-stream: nothing of the archive reaches the file system.

import { once } from "node:events";
import { Readable, type Writable } from "node:stream";
import { createGunzip } from "node:zlib";
import { type Entry, extract, type Headers } from "tar-stream";
import { CleanupStack, quote, RequestError, UnsupportedError } from "../core/index.ts";
import { type ChildProcess, openAgain, type RegularFile } from "../host/index.ts";
import { readCompressionFormat, startUnpacker } from "./decompressor.ts";
import { type SparseExtent, SparseMapReader } from "./sparse-member.ts";

export interface TarMember {
  /** As in the archive ("./etc/hostname"); bytes that are not UTF-8 show as U+FFFD. */
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
const UNPACK_WITH_TAR = { hint: "unpack it with GNU tar" };
const ZEROS = Buffer.alloc(64 * 1024);

/**
 * Members in the order of the archive. `file` is borrowed.
 *
 * @throws an error if it is damaged; UnsupportedError at a member behind which nothing can be read; EnvironmentError; the
 *   abort reason of `signal`
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
 * @throws RequestError if there is no such member, or it is not a regular file or a hard link to one; UnsupportedError if
 *   it is a sparse file in a format other than pax 1.0; as listTar()
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
    refuseOldSparse(entry.header, file.path);
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
  for await (const entry of parser) {
    refuseUnknownType(entry.header, archive.path);
    yield entry;
  }
  signal.throwIfAborted();
  if (tool === undefined) return;
  await tool.exited;
  if (tool.exitCode !== 0) throw tool.failure("read", archive.path);
}

/**
 * The header of a sparse file in GNU's own format may go on in blocks that its size does not count: what follows would be
 * read from the wrong place. tar-stream has no name for its type, nor for others that hold no file of a container.
 */
function refuseUnknownType({ name, type }: Headers, archivePath: string): void {
  if (type !== null && type !== undefined) return;
  throw new UnsupportedError(
    `Cannot read "${archivePath}": member ${quote(name)} is a sparse file in GNU's old format, or of an unknown type`,
    UNPACK_WITH_TAR,
  );
}

/** Formats 0.0 and 0.1 have the map in the pax header, where tar-stream keeps only the last of equal keys. */
function refuseOldSparse({ name, pax }: PaxHeaders, archivePath: string): void {
  const keys = Object.keys(pax ?? {}).filter((key) => key.startsWith("GNU.sparse."));
  if (keys.length === 0 || (pax?.["GNU.sparse.major"] === "1" && pax["GNU.sparse.minor"] === "0")) return;
  const shown = quote(pax?.["GNU.sparse.name"] ?? name);
  throw new UnsupportedError(
    `Cannot extract ${shown} from "${archivePath}": it is a sparse file in a pax format other than 1.0`,
    UNPACK_WITH_TAR,
  );
}

function toMember(header: PaxHeaders): TarMember {
  const pax = header.pax ?? {};
  const type = header.type ?? "other";
  return {
    name: pax["GNU.sparse.name"] ?? header.name,
    type: (KNOWN_TYPES.has(type) ? type : type === "contiguous-file" ? "file" : "other") as TarMember["type"],
    size: Number(pax["GNU.sparse.realsize"] ?? pax["GNU.sparse.size"] ?? header.size ?? 0),
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
