// SPDX-License-Identifier: AGPL-3.0-or-later
// What a program prints, line by line and in bounded memory.
import type { Readable } from "node:stream";

const MAX_LINE_CHARS = 8_192;

/** Calls `onLine` for each line, without the newline; a line that does not end is cut at a bound. */
export function onLines(stream: Readable, onLine: (line: string) => void, encoding: BufferEncoding = "utf8"): void {
  let rest = "";
  stream.setEncoding(encoding);
  stream.on("data", (text: string) => {
    const lines = (rest + text).split("\n");
    rest = (lines.pop() ?? "").slice(0, MAX_LINE_CHARS);
    for (const line of lines) onLine(line.slice(0, MAX_LINE_CHARS));
  });
  stream.on("end", () => {
    if (rest !== "") onLine(rest);
  });
  stream.on("error", () => undefined);
}
