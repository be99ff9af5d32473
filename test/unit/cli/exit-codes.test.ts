// SPDX-License-Identifier: AGPL-3.0-or-later
import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { EXIT_STATUS, ExitCode, exitCodeOf } from "../../../src/cli/exit-codes.ts";
import { OutputClosedError, OutputError } from "../../../src/cli/output.ts";
import {
  CancelledError,
  ChildProcessError,
  CleanupStack,
  EnvironmentError,
  NewerFormatError,
  NotFoundError,
  RequestError,
  UnsupportedError,
} from "../../../src/core/index.ts";
import { LockedError, PointDamagedError, StoreUnavailableError } from "../../../src/store/errors.ts";

describe("exitCodeOf()", () => {
  // As pve-backup-host(1) promises them.
  it.each([
    [new Error("any"), 1],
    [new ChildProcessError("tar is missing"), 1],
    [new UnsupportedError("no sbin"), 1],
    [new OutputError("disk full"), 1],
    [new RequestError("no name"), 2],
    [new PointDamagedError("checksum mismatch"), 3],
    [new NotFoundError("no such backup"), 4],
    [new EnvironmentError("permission denied"), 5],
    [new StoreUnavailableError("not mounted"), 5],
    [new NewerFormatError("format 2"), 5],
    [new LockedError("being removed"), 5],
    [new CancelledError("SIGINT"), 130],
    [new OutputClosedError("head has gone"), 141],
  ])("%s: %i", (error, code) => {
    expect(exitCodeOf(error)).toBe(code);
  });

  it("is that of the first failure, also where releasing the lock failed after it", async () => {
    const check = async (): Promise<void> => {
      await using lock = new CleanupStack();
      lock.defer(() => Promise.reject(new Error("unlock")));
      throw new PointDamagedError("damaged");
    };
    expect(await check().catch(exitCodeOf)).toBe(3);
  });
});

describe("EXIT_STATUS and the man page", () => {
  it("know every status", () => {
    const page = readFileSync(new URL("../../../packaging/man/pve-backup-host.1", import.meta.url), "utf8");
    const table = page.slice(page.indexOf(".TS"), page.indexOf(".TE"));
    const statuses = Object.values(ExitCode);
    expect([...table.matchAll(/^(\d+)\t/gm)].map(([, number]) => Number(number))).toEqual(statuses);
    expect([...EXIT_STATUS.matchAll(/(?:^|, )(\d+) /g)].map(([, number]) => Number(number))).toEqual(statuses);
  });
});
