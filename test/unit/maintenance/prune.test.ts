// SPDX-License-Identifier: AGPL-3.0-or-later
// Expectations made by hand from PVE's documentation of "Backup Retention".
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { type Keep, markBackups, type PruneCandidate } from "../../../src/maintenance/prune.ts";

let zone: string | undefined;
beforeEach(() => {
  zone = process.env.TZ;
});
afterEach(() => {
  if (zone === undefined) delete process.env.TZ;
  else process.env.TZ = zone;
});

const at = (time: string, more: Partial<PruneCandidate> = {}): PruneCandidate => ({
  ...{ vmid: 100, subtype: "qemu", ctime: Date.parse(time) / 1000, protected: false },
  ...more,
});

/** Times in UTC with the mark each is to get. */
type Row = readonly [string, "keep" | "remove" | "protected"];

describe("markBackups()", () => {
  it.each<[string, Keep, readonly Row[]]>([
    [
      "no option at all keeps everything",
      {},
      [
        ["2024-01-01T00:00Z", "keep"],
        ["2020-01-01T00:00Z", "keep"],
      ],
    ],
    [
      "zeros are no options",
      { last: 0, yearly: 0 },
      [
        ["2024-01-01T00:00Z", "keep"],
        ["2020-01-01T00:00Z", "keep"],
      ],
    ],
    [
      "all wins",
      { all: true, last: 1 },
      [
        ["2024-01-01T00:00Z", "keep"],
        ["2020-01-01T00:00Z", "keep"],
      ],
    ],
    [
      "last counts backups, in whatever order they come",
      { last: 2 },
      [
        ["2024-01-01T00:00Z", "remove"],
        ["2024-01-03T00:00Z", "keep"],
        ["2024-01-02T00:00Z", "keep"],
      ],
    ],
    [
      "hourly keeps the newest of each hour that has a backup",
      { hourly: 2 },
      [
        ["2024-01-01T10:59Z", "keep"],
        ["2024-01-01T10:00Z", "remove"],
        ["2024-01-01T07:30Z", "keep"],
        ["2024-01-01T06:30Z", "remove"],
      ],
    ],
    [
      "daily goes on where last ended, and does not count a day that last covers",
      { last: 1, daily: 1 },
      [
        ["2024-01-03T12:00Z", "keep"],
        ["2024-01-03T06:00Z", "remove"],
        ["2024-01-02T12:00Z", "keep"],
        ["2024-01-01T12:00Z", "remove"],
      ],
    ],
    [
      "what one rule gives up, no later one takes back",
      { daily: 1, monthly: 2 },
      [
        ["2024-03-31T12:00Z", "keep"],
        ["2024-03-31T06:00Z", "remove"],
        ["2024-02-28T12:00Z", "keep"],
        ["2024-02-01T12:00Z", "remove"],
        ["2024-01-31T12:00Z", "keep"],
      ],
    ],
    [
      "weeks are ISO weeks: 2021-01-03 is in week 53 of 2020, 2020-12-28 too",
      { weekly: 2 },
      [
        ["2021-01-04T12:00Z", "keep"],
        ["2021-01-03T12:00Z", "keep"],
        ["2020-12-28T12:00Z", "remove"],
        ["2020-12-27T12:00Z", "remove"],
      ],
    ],
    [
      "yearly, and nothing else",
      { yearly: 2 },
      [
        ["2024-12-31T12:00Z", "keep"],
        ["2024-01-01T12:00Z", "remove"],
        ["2022-06-01T12:00Z", "keep"],
        ["2021-06-01T12:00Z", "remove"],
      ],
    ],
  ])("%s", (_name, keep, rows) => {
    process.env.TZ = "UTC";
    const marks = markBackups(
      rows.map(([time]) => at(time)),
      keep,
    );
    expect(marks).toEqual(rows.map(([, mark]) => mark));
  });

  it("marks a protected backup so, and counts it for no rule", () => {
    const backups = [at("2024-01-03T00:00Z", { protected: true }), at("2024-01-02T00:00Z"), at("2024-01-01T00:00Z")];
    expect(markBackups(backups, { last: 1 })).toEqual(["protected", "keep", "remove"]);
    expect(markBackups(backups, { all: true })).toEqual(["protected", "keep", "keep"]);
  });

  it("has a group of its own for each guest and type", () => {
    const backups = [
      at("2024-01-02T00:00Z"),
      at("2024-01-01T00:00Z"),
      at("2023-01-01T00:00Z", { vmid: 101 }),
      at("2022-01-01T00:00Z", { subtype: "lxc" }),
    ];
    expect(markBackups(backups, { last: 1 })).toEqual(["keep", "remove", "keep", "keep"]);
  });

  it("has the days of the node's time zone", () => {
    const backups = [at("2024-01-02T05:30Z"), at("2024-01-02T04:30Z")];
    process.env.TZ = "UTC";
    expect(markBackups(backups, { daily: 2 })).toEqual(["keep", "remove"]);
    process.env.TZ = "America/New_York"; // half past midnight, and an hour before it
    expect(markBackups(backups, { daily: 2 })).toEqual(["keep", "keep"]);
  });

  it("takes the hour that a clock shows twice for one", () => {
    process.env.TZ = "Europe/Vienna"; // 2024-10-27, 02:30 summer time and 02:30 winter time
    const backups = [at("2024-10-27T01:30Z"), at("2024-10-27T00:30Z")];
    expect(markBackups(backups, { hourly: 2 })).toEqual(["keep", "remove"]);
  });
});
