// SPDX-License-Identifier: AGPL-3.0-or-later
import { once } from "node:events";
import { Readable } from "node:stream";
import { describe, expect, it } from "vitest";
import { onLines } from "../../../src/host/index.ts";

async function linesOf(chunks: readonly Buffer[], encoding?: BufferEncoding): Promise<string[]> {
  const stream = Readable.from(chunks, { objectMode: false });
  const lines: string[] = [];
  onLines(stream, (line) => lines.push(line), encoding);
  await once(stream, "close");
  return lines;
}

describe("onLines()", () => {
  it("joins what arrives in pieces, and gives the last line without its end", async () => {
    const pieces = ["on", "e\ntwo\n", "\nfo", "ur"].map((piece) => Buffer.from(piece));
    expect(await linesOf(pieces)).toEqual(["one", "two", "", "four"]);
  });

  it("keeps a character whose bytes arrive apart", async () => {
    expect(await linesOf([Buffer.from([0x63, 0xc3]), Buffer.from([0xa9, 0x0a])])).toEqual(["cé"]);
  });

  it("cuts a line without an end", async () => {
    const pieces = [...Array.from({ length: 40 }, () => Buffer.alloc(1000, "x")), Buffer.from("\nnext\n")];
    const [long, next] = await linesOf(pieces, "latin1");
    expect(long?.length).toBe(8192);
    expect(next).toBe("next");
  });
});
