// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { checkArchiveJob } from "../../../src/archive/check-job.ts";
import { tarFileName } from "../../../src/archive/index.ts";
import type { ArchiveJob } from "../../../src/archive/job.ts";

const job: ArchiveJob = {
  directory: "/mnt/vzsnap0",
  sources: ["./", "./mnt/data"],
  excludePatterns: ["*.log"],
  compression: "none",
  bandwidthLimit: 0,
  archiveFd: 3,
  inUserNamespace: true,
  log: () => undefined,
  signal: new AbortController().signal,
};

describe("checkArchiveJob()", () => {
  it("takes what PVE passes", () => {
    expect(() => checkArchiveJob(job)).not.toThrow();
    expect(() => checkArchiveJob({ ...job, sources: ["."] })).not.toThrow();
  });

  it.each([
    ["a relative folder", { directory: "mnt" }],
    ["no source", { sources: [] }],
    ["an option as source", { sources: ["--checkpoint-action=exec=x"] }],
    ["an absolute source", { sources: ["/etc"] }],
    ["a source above the folder", { sources: ["./../etc"] }],
    ["an empty pattern", { excludePatterns: [""] }],
    ["a NUL in a pattern", { excludePatterns: ["a\0b"] }],
  ])("refuses %s", (_title, change) => {
    expect(() => checkArchiveJob({ ...job, ...change })).toThrow(/^Cannot/);
  });
});

describe("tarFileName()", () => {
  it("names archives as PVE's restore wants them", () => {
    expect((["none", "zlib", "zstd"] as const).map(tarFileName)).toEqual([
      "archive.tar",
      "archive.tar.gz",
      "archive.tar.zst",
    ]);
  });
});
