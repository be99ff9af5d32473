// SPDX-License-Identifier: AGPL-3.0-or-later
// Every crafted image before the library: refused by the first who can, with a reason that names the file.
import { readFileSync, writeFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { requireTool } from "../../support/programs/tools.ts";
import { checkQcow2, openChain, readQcow2Header } from "../../support/qcow2/open-images.ts";
import { openFiles, qemuCheck, qemuImg, scratchDir } from "../../support/qcow2/qcow2-images.ts";
import { expectHostError } from "../cases.ts";
import { CRAFTED, type Stage } from "./crafted.ts";
import { Handmade } from "./handmade.ts";

const { signal } = new AbortController();

/** What each of the four says; undefined where it has nothing to say. */
async function judge(path: string): Promise<Readonly<Record<Stage, string | undefined>>> {
  const said = async (act: () => Promise<string | undefined>): Promise<string | undefined> => {
    try {
      return await act();
    } catch (error) {
      return expectHostError(error).message;
    }
  };
  return {
    header: await said(async () => {
      await readQcow2Header(path);
      return undefined;
    }),
    check: await said(async () => {
      const { errors, leakedClusters } = await checkQcow2(path, { signal });
      return errors[0] ?? (leakedClusters > 0 ? `${leakedClusters} leaked` : undefined);
    }),
    chain: await said(async () => {
      await using _chain = await openChain([path], signal);
      return undefined;
    }),
    read: await said(async () => {
      await using chain = await openChain([path], signal);
      await chain.read(0, Buffer.alloc(Math.min(chain.virtualBytes, 4 * 2 ** 20)), signal);
      return undefined;
    }),
  };
}

const ORDER: readonly Stage[] = ["header", "check", "chain", "read"];

describe("crafted images", () => {
  it("differ from one that QEMU and we find sound", async (context) => {
    requireTool(context, "qemu-img");
    using dir = scratchDir();
    for (const options of [{}, { clusterBits: 9, virtualBytes: 16384 }, { clusterBits: 21 }, { compressionType: 1 }]) {
      const image = new Handmade(options);
      writeFileSync(dir.file("a"), image.bytes);
      expect(qemuCheck(dir.file("a"))).toEqual({ status: 0, corruptions: 0, leaks: 0 });
      expect(await judge(dir.file("a"))).toEqual({});
      qemuImg("convert", "-f", "qcow2", "-O", "raw", dir.file("a"), dir.file("raw"));
      await using chain = await openChain([dir.file("a")], signal);
      const content = Buffer.alloc(chain.virtualBytes);
      await chain.read(0, content, signal);
      expect(content.equals(readFileSync(dir.file("raw")))).toBe(true);
    }
  });

  it.for(CRAFTED)("with $name are refused by the $stage", async ({ stage, says, make }, context) => {
    requireTool(context, "zstd");
    using dir = scratchDir();
    const path = dir.file("image.qcow2");
    writeFileSync(path, make());
    const found = await judge(path);
    const first = ORDER.find((one) => found[one] !== undefined);
    expect({ first, said: found[stage] }, JSON.stringify(found)).toEqual({
      first: stage,
      said: expect.stringMatching(says),
    });
    if (stage !== "check") expect(found[stage]).toContain(path);
    expect(openFiles(dir.path)).toEqual([]);
  });
});
