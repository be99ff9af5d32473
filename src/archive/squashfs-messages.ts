// SPDX-License-Identifier: AGPL-3.0-or-later
// What mksquashfs prints, sorted: counts for the progress line, totals, ACLs that are lost, warnings.
import { toText } from "../core/index.ts";
import type { ArchiveJob } from "./job.ts";
import { Warnings } from "./warnings.ts";

const MAX_UNREAD = 1_000;

/** A file or directory that mksquashfs went on without. */
interface UnreadFile {
  readonly message: string;
  /** False if only its extended attributes were not read: that is a warning to tar, too. */
  readonly isContent: boolean;
}

/** A name may hold line breaks: then the message has as many. */
const UNREAD = [
  /^Failed to read file (.+), creating empty file$/s,
  /^Could not open (.+), skipping\.\.\.$/s,
  /^Cannot stat dir\/file (.+) because .+, ignoring$/s,
  /^Failed to read symlink (.+), ignoring$/s,
];
/** Beyond PATH_MAX nothing can be restored: counted by the scan before, and never a failure. */
const TOO_LONG = /^Cannot stat dir\/file .{3900,} because File name too long, ignoring$/s;
const ATTRIBUTES_UNREAD = /^llistxattr for (.+) failed in read_attrs, because .+$/s;
const BEGINS_UNREAD = /^(?:Failed to read (?:file|symlink) |Could not open |Cannot stat dir\/file |llistxattr for )/;
/** Longest path of the kernel, and the words around it. */
const MAX_MESSAGE_CHARS = 4_096 + 256;

export class SquashfsMessages {
  readonly #warnings: Warnings;
  /** By path as mksquashfs prints it, as bytes ("latin1"). */
  readonly unread = new Map<string, UnreadFile>();
  #unjudged: string | undefined;
  /** The lines so far of a message that goes on, as bytes. */
  #begun: string | undefined;
  #files = 0;
  #inodes = 0;
  #hardLinks = 0;
  #sourceBytes = 0;
  #accessAcls = 0;
  #defaultAcls = 0;

  constructor(log: ArchiveJob["log"]) {
    this.#warnings = new Warnings(log);
  }

  get warnings(): number {
    return this.#warnings.count;
  }

  /** Written so far, about: names with newlines count more than once. */
  get files(): number {
    return this.#files;
  }

  /** Names in the finished image. */
  get members(): number {
    return this.#inodes + this.#hardLinks;
  }

  /** What the image would be without compression. */
  get sourceBytes(): number {
    return this.#sourceBytes;
  }

  /** What to say when mksquashfs failed. */
  get reason(): string {
    return this.#warnings.summary;
  }

  addInfo(line: string): void {
    if (/^(file|directory|symbolic link|fifo|socket|character|block) /.test(line)) this.#files++;
    // The totals come last, so that no name with a newline in it can forge them.
    this.#inodes = numberIn(/^Number of inodes (\d+)$/, line) ?? this.#inodes;
    this.#hardLinks = numberIn(/^Number of hard-links (\d+)$/, line) ?? this.#hardLinks;
    const kilobytes = numberIn(/% of uncompressed filesystem size \(([\d.]+) Kbytes\)$/, line);
    if (kilobytes !== undefined) this.#sourceBytes = Math.round(kilobytes * 1024);
  }

  /** After the last line: a message that may mean an unread file, but does not tell which. */
  get unjudged(): string | undefined {
    return this.#unjudged ?? (this.#begun === undefined ? undefined : toText(this.#begun));
  }

  /** @param line its bytes as "latin1" */
  addError(line: string): void {
    if (this.#begun !== undefined) this.#addUnread(`${this.#begun}\n${line}`);
    else if (line.trim() === "") return;
    else if (/^Unrecognised xattr prefix system\.posix_acl_access/.test(line)) this.#accessAcls++;
    else if (/^Unrecognised xattr prefix system\.posix_acl_default/.test(line)) this.#defaultAcls++;
    else if (BEGINS_UNREAD.test(line)) this.#addUnread(line);
    else this.#warnings.add(toText(line));
  }

  /** What the caller found out about an unread file. */
  warn(message: string): void {
    this.#warnings.add(message);
  }

  close(): void {
    this.#warnings.close();
    const count = this.#accessAcls + this.#defaultAcls;
    if (count === 0) return;
    const kinds = `${this.#accessAcls} access and ${this.#defaultAcls} default`;
    this.#warnings.add(`squashfs cannot store ACLs: ${count} left out (${kinds})`);
  }

  /** Takes what may be a whole message; if it is none, more of it may come. */
  #addUnread(bytes: string): void {
    this.#begun = undefined;
    if (TOO_LONG.test(bytes)) return;
    const path = UNREAD.map((pattern) => pattern.exec(bytes)?.[1]).find((found) => found !== undefined);
    const key = path ?? ATTRIBUTES_UNREAD.exec(bytes)?.[1];
    const message = toText(bytes);
    if (key === undefined) {
      if (bytes.length > MAX_MESSAGE_CHARS) this.#unjudged ??= message;
      else this.#begun = bytes;
      return;
    }
    const isContent = path !== undefined;
    const isKnown = this.unread.has(key);
    if (isKnown || this.unread.size < MAX_UNREAD) {
      if (isContent || !isKnown) this.unread.set(key, { message, isContent });
    } else if (isContent) {
      this.#unjudged ??= `more than ${MAX_UNREAD} files could not be read, among them: ${message}`;
    } else {
      this.#warnings.add(message);
    }
  }
}

function numberIn(pattern: RegExp, line: string): number | undefined {
  const text = pattern.exec(line)?.[1];
  return text === undefined ? undefined : Number(text);
}
