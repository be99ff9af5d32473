// SPDX-License-Identifier: AGPL-3.0-or-later
// Text for task logs and terminals; some of it comes from other programs.

const QUOTED_CHARS = 80;
/** A path of normal length stays whole, and a line of PVE's task log still has room for the reason. */
const PATH_CHARS = 200;
/** The end of a path says more than its beginning. */
const TAIL_SHARE = 2 / 3;
const UUID_PATTERN = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** Folds a text into one line without control characters, because task logs are line-based. */
export function oneLine(text: string): string {
  return text.trim().replace(/[\p{Cc}\u2028\u2029]+/gu, " ");
}

/** `text` in at most `maxChars`: drops the middle, because the beginning says what it is about and the end says why. */
export function shortenMiddle(text: string, maxChars: number): string {
  if (text.length <= maxChars) return text;
  const tail = Math.ceil((maxChars - 1) * TAIL_SHARE);
  return `${text.slice(0, maxChars - 1 - tail)}…${text.slice(-tail)}`;
}

/** A path for a message: after one of 4096 bytes, no log would show the reason that follows. */
export function shortPath(path: string): string {
  return shortenMiddle(path, PATH_CHARS);
}

/** A short, printable form of a name that may be hostile. */
export function quote(name: string): string {
  return JSON.stringify(name.length > QUOTED_CHARS ? `${name.slice(0, QUOTED_CHARS)}...` : name);
}

/** True for a UUID in lower case. */
export function isUuid(text: string): boolean {
  return UUID_PATTERN.test(text);
}

/** The bytes of a text, one per character ("latin1"): a file name consists of bytes and need not be UTF-8. */
export function toBytes(text: string): string {
  return Buffer.from(text, "utf8").toString("latin1");
}

/** The text that bytes ("latin1") stand for, for people and for Node's calls. */
export function toText(bytes: string): string {
  return Buffer.from(bytes, "latin1").toString("utf8");
}
