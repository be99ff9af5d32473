// SPDX-License-Identifier: AGPL-3.0-or-later
// Text for task logs and terminals, some of it in somebody else's words.

const QUOTED_CHARS = 80;
const UUID_PATTERN = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** Folds a text into one line, without control characters: task logs are line based. */
export function oneLine(text: string): string {
  return text.trim().replace(/[\p{Cc}\u2028\u2029]+/gu, " ");
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
