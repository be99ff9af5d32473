// SPDX-License-Identifier: AGPL-3.0-or-later
// A file name is bytes and need not be UTF-8: where that matters, a string holds one byte per character ("latin1").

/** The bytes of a text. */
export const toBytes = (text: string): string => Buffer.from(text, "utf8").toString("latin1");

/** What bytes say, for a person and for Node's own calls. */
export const toText = (bytes: string): string => Buffer.from(bytes, "latin1").toString("utf8");
