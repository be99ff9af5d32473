// SPDX-License-Identifier: AGPL-3.0-or-later
import { readFileSync, writeFileSync } from "node:fs";
import fc from "fast-check";
import { expect, it } from "vitest";
import { CleanupStack } from "../../../src/core/index.ts";
import type { BlockDigestFile } from "../../../src/digest/block-file.ts";
import { ChainDigests, type ClusterState } from "../../../src/digest/chain-digests.ts";
import { type Defined, openBlockDigests, writeBlockDigests } from "../../support/digest/block-files.ts";
import { scratchDir } from "../../support/qcow2/qcow2-images.ts";

const DISK_CLUSTERS = 300;
const nameOf = (state: ClusterState): string =>
  Buffer.isBuffer(state) ? state.toString("latin1", 0, 1) : (state ?? "unknown");

/** One image: for each cluster "d" data, "z" zeroes, "." nothing. */
const image = fc.array(fc.constantFrom("d", "z", "z", ".", ".", "."), {
  minLength: DISK_CLUSTERS,
  maxLength: DISK_CLUSTERS,
});

function recordsOf(kinds: readonly string[], letter: string): Defined[] {
  return kinds.flatMap((kind, cluster): Defined[] => {
    if (kind === ".") return [];
    return [kind === "d" ? { cluster, digest: Buffer.alloc(16, letter) } : { cluster, zeroes: 1 }];
  });
}

it("sees each cluster as the topmost image that defines it, and below all of them zeroes", async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(image, { minLength: 1, maxLength: 5 }),
      fc.nat(DISK_CLUSTERS - 1),
      fc.option(fc.nat(4)),
      async (images, first, missing) => {
        using dir = scratchDir();
        await using stack = new CleanupStack();
        const files: (BlockDigestFile | undefined)[] = [];
        for (const [depth, kinds] of images.entries()) {
          const path = dir.file(`image-${depth}`);
          await writeBlockDigests(path, recordsOf(kinds, String.fromCharCode(65 + depth)));
          files.push(depth === missing ? undefined : stack.use(await openBlockDigests(path)));
        }
        const expected = Array.from({ length: DISK_CLUSTERS - first }, (_, at) => {
          for (const [depth, kinds] of images.entries()) {
            if (depth === missing) return "unknown";
            const kind = kinds[first + at];
            if (kind !== ".") return kind === "d" ? String.fromCharCode(65 + depth) : "zero";
          }
          return "zero";
        });
        const chain = new ChainDigests(files, () => expect.unreachable());
        expect((await chain.states(first, DISK_CLUSTERS - first)).map(nameOf)).toEqual(expected);
      },
    ),
    { numRuns: 60 },
  );
});

it("knows nothing where a file is damaged, except what lies above", async () => {
  using dir = scratchDir();
  await writeBlockDigests(dir.file("top"), [{ cluster: 1, digest: Buffer.alloc(16, "T") }]);
  await writeBlockDigests(dir.file("low"), [{ cluster: 0, zeroes: 9 }]);
  await using top = await openBlockDigests(dir.file("top"));
  await using low = await openBlockDigests(dir.file("low"));
  const bytes = readFileSync(dir.file("low"));
  bytes.writeUInt8(1, 5000);
  writeFileSync(dir.file("low"), bytes);
  const said: string[] = [];
  const chain = new ChainDigests([top, low], (index, reason) => said.push(`${index}: ${reason}`));
  expect((await chain.states(0, 3)).map(nameOf)).toEqual(["unknown", "T", "unknown"]);
  expect(said).toEqual(["1: checksum mismatch in page 1"]);
});
