// SPDX-License-Identifier: AGPL-3.0-or-later
// Holds the pages for administrators and the sources together: every sentence that can be seen is on
// docs/troubleshooting.md, every reason for a full backup in README.md, and neither has one that no source says any more.
//
// An entry of the page is the beginning of a sentence: in backticks, in the first column of a table, with "…" for what
// differs. Quotes do not count. A beginning ends where it is unambiguous: `Cannot read NBD …` covers a family.
// `Cannot read "…": …` covers only the sentences with nothing but a reason behind the colon, so that one with words of
// its own needs a row.
import { readFileSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";
import { findFullReasons, findSentences } from "../support/docs/sentences.ts";

const read = (file: string): string => readFileSync(path.resolve(import.meta.dirname, "../..", file), "utf8");
const page = read("docs/troubleshooting.md");
/** An entry that covers more is too short to say anything. */
const MAX_COVERED = 20;

const plain = (text: string): string => text.replaceAll('"', "").replace(/\s+/g, " ").trim();

/** What a sentence must begin with to be covered by an entry. */
function beginningOf(entry: string): string {
  const text = plain(entry);
  return text.endsWith(": …") ? text : text.replace(/ …$/, " ");
}

/** What is in backticks in the first columns of the tables of `text`. */
function entriesOf(text: string): string[] {
  const cells = [...text.matchAll(/^\| ([^|]*) \|/gm)].map(([, cell = ""]) => cell);
  return cells.flatMap((cell) => [...cell.matchAll(/`([^`]+)`/g)].map(([, entry = ""]) => entry));
}

const sentences = findSentences().map(({ file, text }) => ({ file, text: plain(text) }));
const entries = entriesOf(page);
/** Sentences whose second word differs are nothing to search the sources for. */
const own = entries.filter((entry) => entry.startsWith("Cannot ") && !entry.startsWith("Cannot …"));

it("docs/troubleshooting.md has every sentence that the sources can say", () => {
  expect(sentences.length).toBeGreaterThan(200);
  const beginnings = entries.map(beginningOf);
  const missing = sentences.filter(({ text }) => !beginnings.some((beginning) => text.startsWith(beginning)));
  expect(missing.map(({ file, text }) => `${file}: ${text}`)).toEqual([]);
});

it("docs/troubleshooting.md has no sentence that no source says", () => {
  const stale = own.filter((entry) => !sentences.some(({ text }) => text.startsWith(beginningOf(entry))));
  expect(stale).toEqual([]);
});

it("docs/troubleshooting.md has no entry that covers almost everything", () => {
  const covered = (entry: string): number => sentences.filter(({ text }) => text.startsWith(beginningOf(entry))).length;
  expect(own.filter((entry) => covered(entry) > MAX_COVERED)).toEqual([]);
});

it("README.md has every reason for a full backup, and no other", () => {
  const reasons = findFullReasons();
  expect(reasons.length).toBeGreaterThan(15);
  const rows = entriesOf(read("README.md").split("| the log says |")[1]?.split("\n\n")[0] ?? "");
  const pattern = (text: string): RegExp =>
    new RegExp(`^${text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replaceAll("…", ".*")}$`);
  const isSame = (row: string, reason: string): boolean => pattern(row).test(reason) || pattern(reason).test(row);
  expect(reasons.filter((reason) => !rows.some((row) => isSame(row, reason)))).toEqual([]);
  expect(rows.filter((row) => !reasons.some((reason) => isSame(row, reason)))).toEqual([]);
});
