// SPDX-License-Identifier: AGPL-3.0-or-later
// Images that are large only on paper: neither memory nor time may follow what they claim.
import { execFile } from "node:child_process";
import { truncateSync, writeFileSync } from "node:fs";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type Bundle, buildProgram } from "../../support/programs/bundle.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { checkQcow2 } from "../../support/qcow2/open-images.ts";
import { scratchDir } from "../../support/qcow2/qcow2-images.ts";
import { CRAFTED } from "./crafted.ts";
import { COPIED, DATA, Handmade, L1, L2, MIB, REFCOUNT_TABLE } from "./handmade.ts";

const run = promisify(execFile);
const TIB = 2 ** 40;
const dir = scratchDir();
let program: Bundle;
beforeAll(async () => {
  program = await buildProgram("test/hostile/qcow2/judge-images.ts");
});
afterAll(async () => {
  dir[Symbol.dispose]();
  await program[Symbol.asyncDispose]();
});

function make(name: string, edit: (image: Handmade) => unknown, options: object = {}, fileBytes = 0): string {
  const image = new Handmade(options);
  edit(image);
  const path = dir.file(name);
  writeFileSync(path, image.bytes);
  if (fileBytes > 0) truncateSync(path, fileBytes);
  return path;
}

/** Answers, and the peak of memory in MiB, of a process with little room. */
async function judge(paths: readonly string[]): Promise<{ said: string[]; peakMib: number }> {
  const args = ["--max-old-space-size=64", program.path, ...paths];
  const { stdout } = await run(process.execPath, args, { timeout: 120_000, killSignal: "SIGKILL" });
  const lines = stdout.trimEnd().split("\n");
  return { said: lines.slice(0, -1), peakMib: Number(lines.at(-1)) / 1024 };
}

const SMALL = { clusterBits: 9, virtualBytes: 16384 };
/** Counters of a window of clusters, a refcount table, an L1 table, what they are copied to: and no more. */
const MORE_MIB = 160;

describe("an image that is large on paper", () => {
  it("takes neither time nor memory", async (context) => {
    requireTool(context, "zstd");
    const sound = make("sound", () => undefined);
    const { peakMib: usualMib } = await judge([sound]);
    const paths = [
      // Eight TiB of hole in clusters of 512 bytes: 16 billion of them.
      make("hole", () => undefined, SMALL, 8 * TIB),
      make("hole-without-tables", (image) => image.u64(image.at(L1), 0n), SMALL, 8 * TIB),
      // One reference to its far end.
      make("far-data", (image) => image.u64(image.at(L2), BigInt(7 * TIB) | COPIED), SMALL, 8 * TIB),
      // The largest L1 table there can be, all of it a hole, and all of it one L2 table.
      make(
        "large-l1",
        (image) =>
          image
            .u64(24, BigInt(128 * 1024 * MIB))
            .u32(36, 4 * MIB)
            .u64(40, 32n * 2n ** 20n),
        SMALL,
        64 * MIB,
      ),
      // The largest refcount table there can be, and one whose every entry is the same block.
      make("large-refcounts", (image) => image.u32(56, 128).u64(48, 32n * 2n ** 20n), {}, 64 * MIB),
      make("same-block", (image) => {
        for (let at = 0; at < 65536; at += 8) image.u64(image.at(REFCOUNT_TABLE) + BigInt(at), image.at(3));
      }),
      make("same-data", (image) => {
        for (let at = 0; at < 128; at += 8) image.u64(image.at(L2) + BigInt(at), image.at(DATA) | COPIED);
      }),
      ...CRAFTED.filter(({ stage }) => stage === "read").map(({ make: bytes }, index) => {
        writeFileSync(dir.file(`bomb-${index}`), bytes());
        return dir.file(`bomb-${index}`);
      }),
    ];
    const { said, peakMib } = await judge(paths);
    expect(said).toHaveLength(paths.length);
    expect(said.slice(0, 5)).toEqual([
      "sound",
      "sound",
      expect.stringMatching(/has refcount 0/),
      expect.stringMatching(/errors: host cluster 65536 has refcount 0, but 1 references/),
      expect.stringMatching(/errors: L2 table 0 has refcount 0/), // the new table has no counters
    ]);
    expect(said[5]).toMatch(/^8191 errors: a refcount block lies in host cluster 3/);
    expect(said[6]).toMatch(/errors: cluster 1 of L2 table 0 lies in host cluster 5/);
    expect(said.slice(7).every((line) => /Cannot decompress a z(lib|std) cluster/.test(line))).toBe(true);
    expect(peakMib - usualMib).toBeLessThan(MORE_MIB);
  }, 150_000);
});

describe("checkQcow2()", () => {
  it("can be stopped while it looks at an image that is large on paper", async () => {
    const path = make(
      "slow",
      (image) => {
        image.u32(36, 64); // entries of the L1 table: as many as one cluster holds
        for (let at = 0; at < 512; at += 8) image.u64(image.at(L1) + BigInt(at), BigInt(TIB) + BigInt(at * 64 * MIB));
      },
      SMALL,
      8 * TIB,
    );
    const controller = new AbortController();
    setTimeout(() => controller.abort(new Error("stopped")), 5);
    await expect(checkQcow2(path, { signal: controller.signal })).rejects.toThrow("stopped");
  }, 180_000);
});
