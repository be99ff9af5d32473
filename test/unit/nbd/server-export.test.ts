// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { ExportFailure, mapExport, type NbdExport, type ZeroExtent } from "../../../src/nbd/server-export.ts";

const SIZE = 8192;
const signal = new AbortController().signal;

interface Question {
  readonly offset: number;
  readonly length: number;
}

/** An export whose answers are a list, one for each question; the last one counts for all that follow. */
function answering(...answers: (readonly ZeroExtent[])[]): { source: NbdExport; questions: Question[] } {
  const questions: Question[] = [];
  const source: NbdExport = {
    ...{ name: "disk", sizeBytes: SIZE },
    read: () => Promise.reject(new Error("nothing is read here")),
    async extents(offset, length) {
      questions.push({ offset, length });
      return answers[Math.min(questions.length, answers.length) - 1] ?? [];
    },
  };
  return { source, questions };
}

const data = (length: number): ZeroExtent => ({ length, isZero: false });
const zero = (length: number): ZeroExtent => ({ length, isZero: true });

describe("mapExport()", () => {
  it("joins neighbours of one kind, across answers too", async () => {
    const { source, questions } = answering([data(512), data(512), zero(1024)], [zero(2048), data(4096)]);
    expect(await mapExport(source, 0, SIZE, 10, signal)).toEqual([
      { start: 0, end: 1024, isZero: false },
      { start: 1024, end: 4096, isZero: true },
      { start: 4096, end: 8192, isZero: false },
    ]);
    expect(questions).toEqual([
      { offset: 0, length: 8192 },
      { offset: 2048, length: 6144 },
    ]);
  });

  it("asks for whole blocks and clips the answer to the range", async () => {
    const { source, questions } = answering([zero(512), data(512), zero(512)]);
    expect(await mapExport(source, 1000, 600, 10, signal)).toEqual([
      { start: 1000, end: 1024, isZero: true },
      { start: 1024, end: 1536, isZero: false },
      { start: 1536, end: 1600, isZero: true },
    ]);
    expect(questions).toEqual([{ offset: 512, length: 1536 }]);
  });

  it("calls a zero run only what fills whole blocks", async () => {
    const { source } = answering([data(100), zero(1000), data(948)]);
    expect(await mapExport(source, 0, 2048, 10, signal)).toEqual([
      { start: 0, end: 512, isZero: false },
      { start: 512, end: 1024, isZero: true },
      { start: 1024, end: 2048, isZero: false },
    ]);
    const small = answering([data(100), zero(600), data(1348)]);
    expect(await mapExport(small.source, 0, 2048, 10, signal)).toEqual([{ start: 0, end: 2048, isZero: false }]);
  });

  it("treats the rest of a block that an answer ends in as data", async () => {
    const { source, questions } = answering([zero(700)], [zero(512)]);
    expect(await mapExport(source, 0, 1536, 10, signal)).toEqual([
      { start: 0, end: 512, isZero: true },
      { start: 512, end: 1024, isZero: false },
      { start: 1024, end: 1536, isZero: true },
    ]);
    expect(questions[1]).toEqual({ offset: 1024, length: 512 });
  });

  it("stops at the number of runs", async () => {
    const { source, questions } = answering([data(512)], [zero(512)], [data(512)], [zero(512)]);
    const runs = await mapExport(source, 0, SIZE, 2, signal);
    expect(runs).toHaveLength(2);
    expect(questions).toHaveLength(2);
  });

  it("ends with a prefix if the export answers in too small steps", async () => {
    const { source, questions } = answering([data(512)]);
    const runs = await mapExport({ ...source, sizeBytes: 2 ** 30 }, 0, 2 ** 30, 10, signal);
    expect(runs).toEqual([{ start: 0, end: 256 * 512, isZero: false }]);
    expect(questions).toHaveLength(256);
  });

  it.each([
    ["no extent at all", []],
    ["an extent beyond the range", [data(SIZE + 512)]],
    ["extents that together reach beyond it", [zero(512), zero(SIZE)]],
    ["an empty extent", [zero(0)]],
    ["a negative length", [data(1024), zero(-512)]],
    ["a length that is no number", [zero(Number.NaN)]],
  ])("fails for %s", async (_what, answer) => {
    const failure = await mapExport(answering(answer).source, 0, SIZE, 10, signal).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(ExportFailure);
    expect(failure).toMatchObject({ offset: 0, length: SIZE });
    expect((failure as ExportFailure).cause).toBeInstanceOf(RangeError);
  });
});
