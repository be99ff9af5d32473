// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { copyFileSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { BlockDigestFile } from "../../../src/digest/block-file.ts";
import type { BlockRecord } from "../../../src/digest/block-format.ts";
import {
  createWriter,
  type Defined,
  openBlockDigests,
  SECRET,
  UUID,
  writeBlockDigests,
} from "../../support/digest/block-files.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { scratchDir } from "../../support/qcow2/qcow2-images.ts";

/** Anything with 16 bytes. */
const digestFor = (cluster: number, turn = 0): Buffer => {
  const digest = Buffer.alloc(16, turn + 1);
  digest.writeDoubleBE(cluster + 0.5, 4);
  return digest;
};

async function found(file: BlockDigestFile, first: number, count: number): Promise<string[]> {
  const lines: string[] = [];
  await file.find(first, count, (record) => lines.push(lineOf(record)));
  return lines;
}
const lineOf = ({ cluster, count, digest }: BlockRecord): string =>
  digest === undefined ? `${cluster} zeroes ${count}` : `${cluster} ${digest.toString("hex")}`;
const lineOfDefined = (record: Defined): string =>
  "zeroes" in record
    ? `${record.cluster} zeroes ${record.zeroes}`
    : `${record.cluster} ${record.digest.toString("hex")}`;
const endOfDefined = (record: Defined): number => record.cluster + ("zeroes" in record ? record.zeroes : 1);

/** Records in guest order, from gaps and kinds. */
const records = fc
  .array(fc.tuple(fc.integer({ min: 0, max: 40 }), fc.integer({ min: 0, max: 30 })), { maxLength: 2000 })
  .map((steps) => {
    const made: Defined[] = [];
    let next = 0;
    for (const [gap, kind] of steps) {
      const cluster = next + gap;
      const record = kind < 24 ? { cluster, digest: digestFor(cluster) } : { cluster, zeroes: (kind - 23) ** 4 };
      made.push(record);
      next = endOfDefined(record);
    }
    return made;
  });

describe("BlockDigestFile.find()", () => {
  it("finds exactly the records of a range, wherever it lies and in whatever order it is asked", async () => {
    await fc.assert(
      fc.asyncProperty(
        records,
        fc.array(fc.tuple(fc.nat(60_000), fc.integer({ min: 1, max: 5000 })), { minLength: 1, maxLength: 20 }),
        async (made, questions) => {
          using dir = scratchDir();
          await writeBlockDigests(dir.file("d"), made);
          await using file = await openBlockDigests(dir.file("d"));
          for (const [first, count] of questions) {
            const expected = made.filter((one) => one.cluster < first + count && endOfDefined(one) > first);
            expect(await found(file, first, count)).toEqual(expected.map(lineOfDefined));
          }
        },
      ),
      { numRuns: 60 },
    );
  });

  it("answers questions that are asked at the same time", async () => {
    using dir = scratchDir();
    const made = Array.from({ length: 5000 }, (_, n): Defined => ({ cluster: n * 3, digest: digestFor(n * 3) }));
    await writeBlockDigests(dir.file("d"), made);
    await using file = await openBlockDigests(dir.file("d"));
    const answers = await Promise.all(made.map(({ cluster }) => found(file, cluster, 2)));
    expect(answers).toEqual(made.map((one) => [lineOfDefined(one)]));
  });
});

describe("a file of block digests", () => {
  it("has the layout of docs/store-format.md", async () => {
    using dir = scratchDir();
    await writeBlockDigests(dir.file("d"), [
      { cluster: 5, digest: digestFor(5) },
      { cluster: 2 ** 33, zeroes: 7 },
    ]);
    const bytes = readFileSync(dir.file("d"));
    expect(bytes.length).toBe(2 * 4096);
    expect(bytes.toString("latin1", 32, 40)).toBe("PBHBLKDG");
    expect([bytes.readUInt32BE(40), bytes.readUInt32BE(44), bytes.readBigUInt64BE(48)]).toEqual([1, 65536, 2n ** 40n]);
    expect(bytes.toString("hex", 56, 72)).toBe(UUID.replaceAll("-", ""));
    expect(bytes.subarray(72, 264).equals(SECRET)).toBe(true);
    const page = bytes.subarray(4096);
    expect([page.readBigUInt64BE(16), page.readUInt32BE(24), page.readUInt32BE(28)]).toEqual([1n, 2, 1]);
    expect([page.readBigUInt64BE(32), page.subarray(40, 56)]).toEqual([5n, digestFor(5)]);
    expect([page.readBigUInt64BE(56), page.readBigUInt64BE(64)]).toEqual([2n ** 63n + 2n ** 33n, 7n]);
  });

  it("has the digest that xxhsum prints, and the size that its writer says", async (context) => {
    requireTool(context, "xxhsum");
    using dir = scratchDir();
    const made = Array.from({ length: 60_000 }, (_, n): Defined => ({ cluster: n, digest: digestFor(n) }));
    const { fileBytes, digest } = await writeBlockDigests(dir.file("d"), made);
    expect(readFileSync(dir.file("d")).length).toBe(fileBytes);
    const printed = execFileSync("xxhsum", ["-H2", dir.file("d")], { encoding: "utf8" });
    expect(digest).toEqual({ algorithm: "xxh3-128", value: printed.split(/\s/)[0] });
  });

  it("is no answer where a bit of it has changed: it says so, or nothing is different", async () => {
    using dir = scratchDir();
    const made = Array.from({ length: 400 }, (_, n): Defined => ({ cluster: n * 2, digest: digestFor(n) }));
    await writeBlockDigests(dir.file("d"), made);
    const whole = readFileSync(dir.file("d"));
    const lines = made.map(lineOfDefined);
    for (let at = 0; at < whole.length; at += 13) {
      const bytes = Buffer.from(whole);
      bytes.writeUInt8(bytes.readUInt8(at) ^ (1 << (at % 8)), at);
      writeFileSync(dir.file("changed"), bytes);
      const answer = await openBlockDigests(dir.file("changed"))
        .then(async (file) => await found(file, 0, 1000).finally(() => file[Symbol.asyncDispose]()))
        .catch((error: unknown) => (error as Error).message);
      expect(answer, `byte ${at}`).not.toEqual(lines);
      expect(answer, `byte ${at}`).toEqual(expect.stringMatching(/^it |^checksum mismatch in page [0-3]$/));
    }
  });

  it("that was cut off, has pages swapped, or ends in another file's page is refused", async () => {
    using dir = scratchDir();
    const made = Array.from({ length: 700 }, (_, n): Defined => ({ cluster: n, digest: digestFor(n) }));
    await writeBlockDigests(dir.file("d"), made);
    const whole = readFileSync(dir.file("d"));
    for (const size of [0, 4095, 4096, 8191, whole.length - 1, whole.length - 4096]) {
      copyFileSync(dir.file("d"), dir.file("cut"));
      truncateSync(dir.file("cut"), size);
      await expect(openBlockDigests(dir.file("cut")), `${size} bytes`).rejects.toThrow(/not a complete file/);
    }
    const page = (number: number): Buffer => whole.subarray(number * 4096, (number + 1) * 4096);
    writeFileSync(dir.file("swapped"), Buffer.concat([page(0), page(2), page(1), whole.subarray(3 * 4096)]));
    await using swapped = await openBlockDigests(dir.file("swapped"));
    await expect(found(swapped, 0, 10)).rejects.toThrow("page 1 is not the page of this number");
    await writeBlockDigests(dir.file("other"), made, { secret: Buffer.from(SECRET).reverse() });
    writeFileSync(
      dir.file("mixed"),
      Buffer.concat([whole.subarray(0, -4096), readFileSync(dir.file("other")).subarray(-4096)]),
    );
    await expect(openBlockDigests(dir.file("mixed"))).rejects.toThrow("checksum mismatch in page 5");
  });
});

describe("BlockDigestWriter", () => {
  it("keeps the order of calls that overlap, over many pages and chunks", async () => {
    using dir = scratchDir();
    const digests = Buffer.concat(Array.from({ length: 40 }, (_, n) => digestFor(n)));
    await using writer = await createWriter(dir.file("d"));
    const calls = Array.from({ length: 4000 }, (_, n) => writer.addData(n * 50, digests));
    calls.push(writer.addZeroes(4000 * 50, 9));
    await Promise.all(calls);
    await writer.finish();
    await using file = await openBlockDigests(dir.file("d"));
    const expected = calls.slice(1).flatMap((_, n) => {
      return Array.from({ length: 40 }, (_, at) => lineOfDefined({ cluster: n * 50 + at, digest: digestFor(at) }));
    });
    expect(await found(file, 0, 1_000_000)).toEqual([...expected, "200000 zeroes 9"]);
  });

  it("refuses what is not in guest order, and leaves nothing without finish()", async () => {
    using dir = scratchDir();
    const made: Defined[] = [
      { cluster: 9, zeroes: 3 },
      { cluster: 11, digest: digestFor(11) },
    ];
    await expect(writeBlockDigests(dir.file("d"), made)).rejects.toThrow("expected 12 or later");
    expect(() => readFileSync(dir.file("d"))).toThrow("ENOENT");
  });
});
