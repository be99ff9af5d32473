// SPDX-License-Identifier: AGPL-3.0-or-later
// Exclude patterns in three languages: GNU tar's (what PVE's users write), find's -path and the exclude
// file of mksquashfs. Pure. Both tar and find match with the same fnmatch(), "*" and "?" crossing slashes;
// mksquashfs matches one component at a time, so most patterns reach it as the paths that find found.
//
// Texts here hold bytes: one character per byte ("latin1"), for names need not be UTF-8.

/** Always excluded: what mkfs leaves in the root of a file system. */
export const LOST_AND_FOUND = "lost+found";

const isAnchored = (pattern: string): boolean => pattern.startsWith("/");

/** GNU tar's options for `patterns`. Unanchored ones match after any slash. */
export function tarExcludeFlags(patterns: readonly string[]): string[] {
  const anchored = patterns.filter(isAnchored);
  const unanchored = patterns.filter((pattern) => !isAnchored(pattern));
  return [
    "--no-anchored",
    ...[LOST_AND_FOUND, ...unanchored].map((pattern) => `--exclude=${tarPattern(pattern)}`),
    "--anchored",
    ...anchored.map((pattern) => `--exclude=.${tarPattern(pattern)}`),
  ];
}

/**
 * The same pattern, never without a wildcard: tar keeps those without one in a table and looks up each part of each name
 * there. For 1,200 nested directories, which any user of a container can make, that takes hours; fnmatch() takes
 * milliseconds.
 */
function tarPattern(pattern: string): string {
  if (hasWildcard(pattern)) return pattern;
  return escapeGlob(removeBackslashes(pattern)).replace(/[A-Za-z0-9._+](?=[^A-Za-z0-9._+]*$)/, "[$&]");
}

/** The find tests of one pattern, to be joined by -o. Paths begin with "./", as in tar. */
export function findTests(pattern: string): string[] {
  const text = hasWildcard(pattern) ? pattern : escapeGlob(removeBackslashes(pattern));
  return isAnchored(pattern) ? ["-path", `.${text}`] : ["-path", text, "-o", "-path", `*/${text}`];
}

/**
 * Lines for the exclude file of mksquashfs (with -wildcards) that mean exactly what `pattern` means to tar.
 * Only for the forms that people use, where a long list of paths would cost most: "*.log", "name*", "/tmp/?*".
 *
 * @returns undefined if this pattern has to become a list of paths
 */
export function nativeExcludeLines(pattern: string): string[] | undefined {
  const contents = /^((?:\/[^/*?[\]\\]+)+)\/\??\*+$/.exec(pattern);
  if (contents?.[1] !== undefined) return contentsExcludeLines(contents[1].slice(1));
  const name = /^(\**)([^/*?[\]\\]+)(\**)$/.exec(pattern);
  if (name?.[2] === undefined) return undefined;
  const literal = name[2];
  // A leading star does not match a leading period there.
  const heads = name[1] === "" ? [""] : ["*", ".*", ...(literal.startsWith(".") ? [""] : [])];
  const tail = name[3] === "" ? "" : "*";
  return heads.map((head) => `... ${head}${escapeForExcludeFile(literal)}${tail}`);
}

/** Excludes one path, relative to the root and without a leading "./". */
export function pathExcludeLine(path: string): string {
  return `\\${path.split("/").map(escapeForExcludeFile).join("/")}`; // the first backslash of a line is dropped
}

/** Excludes everything in a directory, but not the directory. */
export function contentsExcludeLines(path: string): string[] {
  const line = pathExcludeLine(path);
  return [`${line}/*`, `${line}/.*`];
}

/** As gnulib's exclude.c decides it: without a wildcard, backslashes are removed and the rest is compared. */
function hasWildcard(pattern: string): boolean {
  for (let at = 0; at < pattern.length; at++) {
    const char = pattern.charAt(at);
    if (char === "\\") at++;
    else if (char === "?" || char === "*" || char === "[") return true;
  }
  return false;
}

function removeBackslashes(pattern: string): string {
  return pattern.replace(/\\(.)/gs, "$1"); // one at the end stays
}

/** Escaped so that fnmatch() takes each character for itself. */
function escapeGlob(text: string): string {
  return text.replace(/[\\*?[\]]/g, "\\$&");
}

/** The exclude file has one line per entry: a newline becomes "no byte but the newline". */
export function escapeForExcludeFile(name: string): string {
  return name.replace(/[^A-Za-z0-9_\u0080-\u00ff\n]/g, "\\$&").replace(/\n/g, "[!\u0001-\u0009\u000b-\u00ff]");
}
