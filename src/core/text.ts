// SPDX-License-Identifier: AGPL-3.0-or-later
// Text for task logs and terminals, some of it in somebody else's words.

const QUOTED_CHARS = 80;
/** A path of usual length stays whole, and a line of PVE's task log has room for the reason. */
const PATH_CHARS = 200;
/** The end of a path tells more than its beginning. */
const TAIL_SHARE = 2 / 3;
const UUID_PATTERN = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** Folds a text into one line, without control characters: task logs are line based. */
export function oneLine(text: string): string {
  return text.trim().replace(/[\p{Cc}\u2028\u2029]+/gu, " ");
}

/** `text` in at most `maxChars`: the middle goes, as the beginning says what it is about and the end why. */
export function shortenMiddle(text: string, maxChars: number): string {
  if (text.length <= maxChars) return text;
  const tail = Math.ceil((maxChars - 1) * TAIL_SHARE);
  return `${text.slice(0, maxChars - 1 - tail)}…${text.slice(-tail)}`;
}

/** A path for a message: with one of 4096 bytes no log would show the reason that follows it. */
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

/** The bytes of a text, one per character ("latin1"): a file name is bytes and need not be UTF-8. */
export function toBytes(text: string): string {
  return Buffer.from(text, "utf8").toString("latin1");
}

/** What bytes ("latin1") say, for a person and for Node's own calls. */
export function toText(bytes: string): string {
  return Buffer.from(bytes, "latin1").toString("utf8");
}
