// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import type { Extent } from "../../../src/block/index.ts";
import type { FileHandleCalls } from "../../../src/provider/index.ts";
import { mustBeWhole, mustMatchBitmap, REGIONS_PER_BATCH, reportedRegions } from "../../../src/source/dirty-regions.ts";

const DISK = "drive-scsi0";
const SIZE = 1000;
const TIMEOUT_MS = 4_000;
const never = new AbortController().signal;
type Pair = readonly [offset: number, length: number];

const extents = (pairs: readonly Pair[]): Extent[] => pairs.map(([offset, length]) => ({ offset, length }));

async function* stream(pairs: readonly Pair[]): AsyncGenerator<Extent, void, undefined> {
  yield* extents(pairs);
}

/** Perl sides that answer batch by batch; the last batch says that it is the last. */
function perlSide(
  batches: ReadonlyArray<readonly Pair[]>,
): FileHandleCalls & { readonly asked: Array<readonly [max: number, timeoutMs: number]> } {
  const left = [...batches];
  const asked: Array<readonly [max: number, timeoutMs: number]> = [];
  return {
    asked,
    nextDirtyRegions: async (_device, max, timeoutMs) => {
      asked.push([max, timeoutMs]);
      const regions = extents(left.shift() ?? []);
      return { regions, done: left.length === 0 };
    },
    deallocate: async () => undefined,
  };
}

async function collect(calls: FileHandleCalls, sizeBytes = SIZE): Promise<Extent[]> {
  const regions: Extent[] = [];
  for await (const region of reportedRegions(DISK, sizeBytes, calls, TIMEOUT_MS, never)) regions.push(region);
  return regions;
}

describe("reportedRegions()", () => {
  it("asks batch by batch until the Perl side is done, and for no more than it can hold", async () => {
    const calls = perlSide([
      [[0, 10]],
      [
        [10, 10],
        [500, 500],
      ],
      [],
    ]);
    expect(await collect(calls)).toEqual(
      extents([
        [0, 10],
        [10, 10],
        [500, 500],
      ]),
    );
    expect(calls.asked).toEqual(Array.from({ length: 3 }, () => [REGIONS_PER_BATCH, TIMEOUT_MS]));
    expect(REGIONS_PER_BATCH).toBeLessThanOrEqual(65_536);
  });

  it.each<[string, ReadonlyArray<readonly Pair[]>, RegExp]>([
    ["an empty region", [[[5, 0]]], /PVE reports 0 bytes at 5$/],
    [
      "an overlap",
      [
        [
          [0, 100],
          [99, 10],
        ],
      ],
      /PVE reports 10 bytes at 99, after a region that ends at 100$/,
    ],
    ["an overlap between batches", [[[0, 100]], [[50, 10]]], /10 bytes at 50, after a region that ends at 100$/],
    [
      "the same region twice",
      [
        [
          [7, 7],
          [7, 7],
        ],
      ],
      /7 bytes at 7, after a region that ends at 14$/,
    ],
    [
      "a descent",
      [
        [
          [500, 10],
          [100, 10],
        ],
      ],
      /10 bytes at 100, after a region that ends at 510$/,
    ],
    ["an end beyond the disk", [[[990, 11]]], /PVE reports 11 bytes at 990 of a disk of 1000$/],
    ["a start beyond the disk", [[[2000, 1]]], /PVE reports 1 bytes at 2000 of a disk of 1000$/],
    ["numbers whose sum is not exact", [[[1, Number.MAX_SAFE_INTEGER]]], /of a disk of 1000$/],
    ["a batch that says nothing, and not that it is the last", [[], [[0, 1]]], /more of them follow, but not which$/],
  ])("refuses %s", async (_what, batches, sentence) => {
    const error = await collect(perlSide(batches)).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ code: "INVALID_PARAMS", hint: expect.stringContaining("vm-backup-mechanism nbd") });
    expect((error as Error).message).toMatch(/^Cannot verify the dirty regions of "drive-scsi0": /);
    expect((error as Error).message).toMatch(sentence);
  });

  it("does not go on asking a Perl side that never ends", async () => {
    const calls = perlSide([]);
    const endless = { ...calls, nextDirtyRegions: async () => ({ regions: extents([[0, 1]]), done: false }) };
    await expect(collect(endless)).rejects.toThrow(/after a region that ends at 1$/);
  });
});

describe("mustBeWhole()", () => {
  it("takes the whole disk, in one piece or in several", async () => {
    await mustBeWhole(DISK, SIZE, stream([[0, SIZE]]));
    await mustBeWhole(
      DISK,
      SIZE,
      stream([
        [0, 1],
        [1, 998],
        [999, 1],
      ]),
    );
    await mustBeWhole(DISK, 0, stream([]));
  });

  it.each<[string, readonly Pair[], number]>([
    ["silence", [], 0],
    ["a missing beginning", [[1, 999]], 0],
    [
      "a missing middle",
      [
        [0, 400],
        [401, 599],
      ],
      400,
    ],
    [
      "a missing end",
      [
        [0, 400],
        [400, 599],
      ],
      999,
    ],
  ])("refuses %s", async (_what, pairs, end) => {
    await expect(mustBeWhole(DISK, SIZE, stream(pairs))).rejects.toThrow(
      `Cannot verify the dirty regions of "${DISK}": PVE reports them without gap to byte ${end} only, a full backup needs all ${SIZE}`,
    );
  });
});

describe("mustMatchBitmap()", () => {
  const bitmap: readonly Pair[] = [
    [100, 100],
    [300, 50],
    [350, 50],
    [600, 1],
  ];

  it("takes the same bytes however they are cut, and counts them", async () => {
    expect(await mustMatchBitmap(DISK, stream(bitmap), stream(bitmap))).toBe(201);
    expect(
      await mustMatchBitmap(
        DISK,
        stream([
          [100, 30],
          [130, 70],
          [300, 100],
          [600, 1],
        ]),
        stream(bitmap),
      ),
    ).toBe(201);
    expect(await mustMatchBitmap(DISK, stream([]), stream([]))).toBe(0);
  });

  it.each<[string, readonly Pair[], string]>([
    ["silence", [], "PVE reports nothing more, QEMU's bitmap says 100 bytes at 100"],
    ["an end too early", bitmap.slice(0, 3), "PVE reports nothing more, QEMU's bitmap says 1 bytes at 600"],
    [
      "a region too short",
      [
        [100, 99],
        [300, 100],
        [600, 1],
      ],
      "PVE reports 99 bytes at 100, QEMU's bitmap says 100",
    ],
    [
      "a region left out",
      [
        [300, 100],
        [600, 1],
      ],
      "PVE reports 100 bytes at 300, QEMU's bitmap says 100 bytes at 100",
    ],
    ["a region too many", [...bitmap, [700, 1]], "PVE reports 1 bytes at 700, QEMU's bitmap says nothing more"],
    ["everything", [[0, SIZE]], `PVE reports ${SIZE} bytes at 0, QEMU's bitmap says 100 bytes at 100`],
  ])("refuses %s", async (_what, pairs, sentence) => {
    await expect(mustMatchBitmap(DISK, stream(pairs), stream(bitmap))).rejects.toThrow(sentence);
  });
});
