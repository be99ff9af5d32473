// SPDX-License-Identifier: AGPL-3.0-or-later
// Lists an archive once, end to end, before it is trusted: by the tools that will restore it, with
// few rights, for its content is the container's.
import type { FileHandle } from "node:fs/promises";
import { ChildProcessError } from "../core/index.ts";
import {
  ChildProcess,
  onLines,
  openAgain,
  type RegularFile,
  readerFlags,
  reopenerFlags,
  waitForChildren,
} from "../host/index.ts";
import { startDecompressor } from "./decompressor.ts";

export interface ArchiveContents {
  /** Names in the archive, the root included; a directory given as two sources counts twice in a tar. */
  readonly members: number;
  /** Sizes of the regular files, holes included. */
  readonly totalBytes: number;
  /** PVE refuses to restore a container without a directory or link of this name in its root. */
  readonly hasSbin: boolean;
}

/** The first fields of the squashfs superblock. Source: Linux, fs/squashfs/squashfs_fs.h. */
const SQUASHFS_MAGIC = 0x73717368;
const SUPERBLOCK_BYTES = 96;
const BYTES_USED_AT = 40;
/** What GNU tar prints with --block-number for the two blocks of zeroes that end every archive. */
const TAR_END = /^block \d+: \*\* Block of NULs \*\*$/;

/** Lists an archive of either kind, by its name; it is borrowed. @throws as inspectTar() and inspectSquashfs() */
export function inspectArchive(archive: RegularFile, signal: AbortSignal): Promise<ArchiveContents> {
  return archive.path.endsWith(".sqfs") ? inspectSquashfs(archive, signal) : inspectTar(archive, signal);
}

/**
 * Lists a tar, through its compressor if it has one.
 *
 * @throws ChildProcessError if tar or the compressor finds it damaged or cut off, EnvironmentError, and the abort
 *   reason of `signal`
 */
export async function inspectTar(archive: RegularFile, signal: AbortSignal): Promise<ArchiveContents> {
  signal.throwIfAborted();
  const { path } = archive;
  await using file = await openAgain(archive);
  await using decompressor = await startDecompressor(file, path);
  const listing = new Listing(/^block \d+: ([a-zA-Z-])\S* +\d+\/\d+ +(\d+)(?:,\d+)? +\S+ +\S+ (.*)$/, isSbinInTar);
  let reason: string | undefined; // its last words only say that it stops
  await using tar = await ChildProcess.start(
    "tar",
    ["--list", "--verbose", "--block-number", "--numeric-owner", "--quoting-style=escape", "--file=-"],
    {
      stdio: [decompressor?.output ?? file.fd, "pipe"],
      cwd: "/", // user nobody may not be allowed into ours
      setprivFlags: await readerFlags(),
      onStderrLine: (line) => {
        reason ??= line.replace(/^tar: /, "");
      },
    },
  );
  let isWhole = false;
  if (tar.stdout !== null) {
    onLines(tar.stdout, (line) => {
      listing.add(line);
      // tar takes a file that ends after a header, or in the data behind it, for a whole one.
      if (TAR_END.test(line)) isWhole = true;
    });
  }
  await waitForChildren([tar], signal);
  if (decompressor !== undefined) {
    const { tool } = decompressor;
    if (tar.exitCode === 0) {
      const drained = decompressor.drain();
      await waitForChildren([tool], signal);
      await drained;
    }
    // Its failure comes first: tar only sees that its input ends.
    if (tool.hasExited && tool.exitCode !== 0) throw tool.failure("list", path);
  }
  if (tar.exitCode !== 0) throw tar.failure("list", path, reason);
  if (!isWhole)
    throw new ChildProcessError(`Cannot list ${JSON.stringify(path)}: it is cut off, its end mark is missing`);
  return listing.contents();
}

/**
 * Lists a squashfs image.
 *
 * @throws ChildProcessError if it is damaged or cut off, EnvironmentError, and the abort reason of `signal`
 */
export async function inspectSquashfs(archive: RegularFile, signal: AbortSignal): Promise<ArchiveContents> {
  const { path } = archive;
  await using file = await openAgain(archive);
  await checkSuperblock(file, path);
  const listing = new Listing(
    /^([a-z-])\S{9} +\d+\/\d+ +(\d+)(?:, *\d+)? \d{4}-\d\d-\d\d \d\d:\d\d squashfs-root(.*)$/,
    (type, rest) => (type === "d" && rest === "/sbin") || (type === "l" && rest.startsWith("/sbin -> ")),
  );
  await using tool = await ChildProcess.start("unsquashfs", ["-lln", "-d", "squashfs-root", "/proc/self/fd/3"], {
    stdio: ["ignore", "pipe", file.fd],
    cwd: "/",
    setprivFlags: await reopenerFlags(file),
  });
  if (tool.stdout !== null) onLines(tool.stdout, (line) => listing.add(line));
  await waitForChildren([tool], signal);
  if (tool.exitCode !== 0) throw tool.failure("list", path);
  return listing.contents();
}

async function checkSuperblock(file: FileHandle, path: string): Promise<void> {
  const bytes = Buffer.alloc(SUPERBLOCK_BYTES);
  const { bytesRead } = await file.read(bytes, 0, SUPERBLOCK_BYTES, 0);
  if (bytesRead < SUPERBLOCK_BYTES || bytes.readUInt32LE(0) !== SQUASHFS_MAGIC) {
    throw new ChildProcessError(`Cannot list ${JSON.stringify(path)}: it is not a squashfs image`);
  }
  const expectedBytes = bytes.readBigUInt64LE(BYTES_USED_AT);
  const { size } = await file.stat();
  if (BigInt(size) < expectedBytes) {
    throw new ChildProcessError(`Cannot list ${JSON.stringify(path)}: it has ${size} bytes, expected ${expectedBytes}`);
  }
}

function isSbinInTar(type: string, rest: string): boolean {
  const name = rest.replace(/^\.\//, "");
  if (type === "d") return name === "sbin/";
  if (type === "l") return name.startsWith("sbin -> ");
  return type === "h" && name.startsWith("sbin link to ");
}

/** Sums up the lines of a long listing: type, size, the rest. Other lines are not members. */
class Listing {
  readonly #line: RegExp;
  readonly #isSbin: (type: string, rest: string) => boolean;
  #members = 0;
  #totalBytes = 0;
  #hasSbin = false;

  constructor(line: RegExp, isSbin: (type: string, rest: string) => boolean) {
    this.#line = line;
    this.#isSbin = isSbin;
  }

  add(line: string): void {
    const [, type, size, rest] = this.#line.exec(line) ?? [];
    if (type === undefined || size === undefined || rest === undefined) return;
    this.#members++;
    if (type === "-") this.#totalBytes += Number(size);
    this.#hasSbin ||= this.#isSbin(type, rest);
  }

  contents(): ArchiveContents {
    return { members: this.#members, totalBytes: this.#totalBytes, hasSbin: this.#hasSbin };
  }
}
