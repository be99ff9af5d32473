// SPDX-License-Identifier: AGPL-3.0-or-later
// What mksquashfs prints, sorted: counts for the progress line, totals, ACLs that are lost, warnings.
import type { ArchiveJob } from "./job.ts";
import { Warnings } from "./warnings.ts";

const MAX_UNREAD = 1_000;

/** A file or folder that mksquashfs went on without. */
export interface UnreadFile {
  readonly message: string;
  /** False if only its extended attributes were not read: that is a warning to tar, too. */
  readonly isContent: boolean;
}

const UNREAD = [
  /^Failed to read file (.+), creating empty file$/,
  /^Could not open (.+), skipping\.\.\.$/,
  /^Cannot stat dir\/file (.+) because .+, ignoring$/,
  /^Failed to read symlink (.+), ignoring$/,
];

export class SquashfsMessages {
  readonly #warnings: Warnings;
  /** By path as mksquashfs prints it. */
  readonly unread = new Map<string, UnreadFile>();
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

  addError(line: string): void {
    if (line.trim() === "") return;
    if (/^Unrecognised xattr prefix system\.posix_acl_access/.test(line)) this.#accessAcls++;
    else if (/^Unrecognised xattr prefix system\.posix_acl_default/.test(line)) this.#defaultAcls++;
    else if (!this.#addUnread(line)) this.#warnings.add(line);
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

  #addUnread(message: string): boolean {
    const path = UNREAD.map((pattern) => pattern.exec(message)?.[1]).find((found) => found !== undefined);
    const attributesOf = /^llistxattr for (.+) failed in read_attrs, because .+$/.exec(message)?.[1];
    const key = path ?? attributesOf;
    if (key === undefined) return false;
    if (this.unread.size >= MAX_UNREAD && !this.unread.has(key)) this.#warnings.add(message);
    else if (path !== undefined || !this.unread.has(key))
      this.unread.set(key, { message, isContent: path !== undefined });
    return true;
  }
}

function numberIn(pattern: RegExp, line: string): number | undefined {
  const text = pattern.exec(line)?.[1];
  return text === undefined ? undefined : Number(text);
}
