// SPDX-License-Identifier: AGPL-3.0-or-later
// Generated state files, witnesses, locks and attributes: what is taken is exactly what the format allows.
import { describe, it } from "vitest";
import { parseAttributes } from "../../../src/store/attributes.ts";
import { decodeLockRecord } from "../../../src/store/lock/lock-record.ts";
import { parseState } from "../../../src/store/state.ts";
import { parseWitness } from "../../../src/store/witness.ts";
import { CASES, CASES_TIMEOUT_MS } from "../cases.ts";
import { holdToFormat } from "./hold-to-format.ts";
import { fits, type SHAPES } from "./shapes.ts";

const UUID = "12345678-9abc-4def-8012-3456789abcde";
const OTHER = "00000000-1111-4222-8333-444444444444";
const process = { bootId: OTHER, pid: 4711, startTime: "123456" };
const head = (format: string) => ({ format: `pve-backup-host-${format}`, version: 1 });

function compare(
  shape: keyof typeof SHAPES,
  sound: readonly object[],
  parse: (bytes: Buffer) => unknown,
  runs: number,
): void {
  const tally = holdToFormat({ sound, parse, allows: fits(shape) }, 62, runs);
  tally.expectAtLeast({ sound: runs / 10, "taken in spite of an edit": runs / 50, refused: runs / 3 });
}

describe("parseState()", () => {
  it(
    "takes exactly what the format allows, and says of the rest in one line what is wrong",
    () => {
      const newest = {
        bk: { uuid: UUID, archive: "100/qemu-1700000000" },
        "other-1": { uuid: OTHER, archive: "100/lxc-0" },
      };
      const state = { ...head("state"), sequence: 7, newest };
      compare("state", [state, { ...state, newest: {} }], parseState, CASES);
    },
    CASES_TIMEOUT_MS,
  );
});

describe.each([
  [
    "witness",
    parseWitness,
    [
      {
        ...head("witness"),
        storeid: "bk",
        vmid: 100,
        settled: UUID,
        guest: { vmgenid: UUID, process },
        foreign: ["a"],
      },
      { ...head("witness"), storeid: "bk", vmid: 100, inFlight: UUID, guest: {}, foreign: [] },
    ],
  ],
  [
    "lock",
    decodeLockRecord,
    [
      {
        ...head("lock"),
        ...{ uuid: UUID, hostId: "0123456789abcdef".repeat(2), hostname: "pve1", process },
        ...{ since: "2025-01-01T00:00:00.000Z", heartbeat: 3 },
      },
    ],
  ],
  [
    "attributes",
    parseAttributes,
    [
      { ...head("attributes"), protected: true, notes: "two\nlines" },
      { ...head("attributes"), verify: { state: "failed", at: "2025-01-01T00:00:00.000Z", message: "it is gone" } },
    ],
  ],
] as const)("the reader of a file of kind %s", (shape, parse, sound) => {
  it(
    "takes exactly what the format allows, and says of the rest in one line what is wrong",
    () => compare(shape, sound, parse, CASES / 4),
    CASES_TIMEOUT_MS,
  );
});
