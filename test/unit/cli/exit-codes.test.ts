// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { ExitCode, exitCodeOf } from "../../../src/cli/exit-codes.ts";
import { CleanupStack } from "../../../src/core/index.ts";
import { PointDamagedError } from "../../../src/store/index.ts";

describe("exitCodeOf()", () => {
  it("is that of the first failure, also where releasing the lock failed after it", async () => {
    const check = async (): Promise<void> => {
      await using lock = new CleanupStack();
      lock.defer(() => Promise.reject(new Error("unlock")));
      throw new PointDamagedError("damaged");
    };
    expect(await check().catch(exitCodeOf)).toBe(ExitCode.Damaged);
  });

  it("is 1 for what has no code of its own", () => {
    expect(exitCodeOf(new Error("any"))).toBe(ExitCode.Failed);
  });
});
