// SPDX-License-Identifier: AGPL-3.0-or-later
import { beforeEach, describe, expect, it } from "vitest";
import { ChildProcess, waitForChildren } from "../../../src/host/index.ts";
import { requireTool } from "../../support/programs/tools.ts";

const never = new AbortController().signal;

beforeEach((context) => requireTool(context, "setpriv"));

describe("waitForChildren()", () => {
  it("waits for the last of them", async () => {
    await using quick = await ChildProcess.start("true", []);
    await using slow = await ChildProcess.start("sleep", ["0.3"]);
    await waitForChildren([quick, slow], never);
    expect([quick.hasExited, slow.hasExited]).toEqual([true, true]);
  });

  it("ends with the abort reason while they run", async () => {
    await using child = await ChildProcess.start("sleep", ["60"]);
    const aborter = new AbortController();
    const reason = new Error("cancelled");
    setTimeout(() => aborter.abort(reason), 50);
    await expect(waitForChildren([child], aborter.signal)).rejects.toBe(reason);
    expect(child.hasExited).toBe(false);
    await expect(waitForChildren([child], aborter.signal)).rejects.toBe(reason);
  });
});
