// SPDX-License-Identifier: AGPL-3.0-or-later
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { SourceExtent } from "../../../src/block/index.ts";
import { type CopyStep, planCopy } from "../../../src/block/read-plan.ts";

const CLUSTER = 8;
const MAX_READ = 32;

async function plan(extents: SourceExtent[], sizeBytes: number): Promise<CopyStep[]> {
  async function* source(): AsyncGenerator<SourceExtent> {
    yield* extents;
  }
  const steps: CopyStep[] = [];
  for await (const step of planCopy(source(), { sizeBytes, clusterBytes: CLUSTER, maxReadBytes: MAX_READ }))
    steps.push(step);
  return steps;
}

describe("planCopy()", () => {
  it("reads a cluster whole that is zero only in part", async () => {
    expect(
      await plan(
        [
          { offset: 0, length: 4, zero: true },
          { offset: 4, length: 4, zero: false },
        ],
        8,
      ),
    ).toEqual([{ kind: "data", offset: 0, length: 8 }]);
  });

  it("never reads what the source calls zero", async () => {
    expect(await plan([{ offset: 0, length: 80, zero: true }], 80)).toEqual([{ kind: "zero", offset: 0, length: 80 }]);
  });

  it("leaves what is not covered to the base", async () => {
    expect(await plan([{ offset: 10, length: 3, zero: false }], 80)).toEqual([
      { kind: "partial", offset: 8, length: 8, extents: [{ offset: 10, length: 3, zero: false }] },
    ]);
  });

  it("takes the short last cluster of the disk for a whole one", async () => {
    expect(await plan([{ offset: 16, length: 3, zero: false }], 19)).toEqual([{ kind: "data", offset: 16, length: 3 }]);
  });

  it("cuts reads at multiples of the longest read", async () => {
    expect(await plan([{ offset: 8, length: 64, zero: false }], 80)).toEqual([
      { kind: "data", offset: 8, length: 24 },
      { kind: "data", offset: 32, length: 32 },
      { kind: "data", offset: 64, length: 8 },
    ]);
  });

  it("covers every dirty byte exactly once, in order, with the right kind, for any map", async () => {
    // A map of bytes: c(lean), z(ero) or d(ata); the oracle looks at single bytes.
    const byteMap = fc
      .array(fc.record({ kind: fc.constantFrom("c", "z", "d"), length: fc.integer({ min: 1, max: 70 }) }), {
        maxLength: 20,
      })
      .map((runs) => runs.map(({ kind, length }) => kind.repeat(length)).join(""));
    await fc.assert(
      fc.asyncProperty(byteMap, fc.integer({ min: 0, max: 9 }), async (map, tail) => {
        const disk = map + "c".repeat(tail);
        const steps = await plan(extentsOf(disk), disk.length);
        const planned = Array.from(disk, () => "c");
        let last = 0;
        for (const step of steps) {
          expect(step.offset).toBeGreaterThanOrEqual(last);
          expect(step.offset % CLUSTER).toBe(0);
          last = step.offset + step.length;
          expect(last % CLUSTER === 0 || last === disk.length).toBe(true);
          const inside = disk.slice(step.offset, last);
          if (step.kind === "zero") expect(inside).toMatch(/^z+$/);
          if (step.kind === "data") {
            expect(inside).toMatch(/^[zd]+$/);
            expect(step.length).toBeLessThanOrEqual(MAX_READ);
          }
          if (step.kind === "partial") expect(inside).toContain("c");
          const ranges = step.kind === "partial" ? step.extents : [{ ...step, zero: step.kind === "zero" }];
          for (const range of ranges) {
            for (let at = range.offset; at < range.offset + range.length; at++) {
              expect(planned[at]).toBe("c");
              planned[at] = step.kind === "data" ? (disk[at] ?? "?") : range.zero ? "z" : "d";
            }
          }
        }
        expect(planned.join("")).toBe(disk);
      }),
      { numRuns: 500, seed: 7 },
    );
  });
});

function extentsOf(disk: string): SourceExtent[] {
  const extents: SourceExtent[] = [];
  for (const match of disk.matchAll(/z+|d+/g)) {
    extents.push({ offset: match.index, length: match[0].length, zero: match[0][0] === "z" });
  }
  return extents;
}
