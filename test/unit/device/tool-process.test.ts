// SPDX-License-Identifier: AGPL-3.0-or-later
// Tools as real children; a shell plays them.
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { until } from "../../../fixtures/lab/index.ts";
import { ToolProcess } from "../../../src/device/tool-process.ts";
import { requireTool } from "../../support/programs/tools.ts";

let dir: string;
let tool: ToolProcess;

beforeEach(async (context) => {
  requireTool(context, "setpriv");
  dir = await mkdtemp(path.join(os.tmpdir(), "tool-process-"));
  const script = "echo is now connected to json: >&2; until [ -e go ]; do sleep 0.05; done; echo lost it >&2; exit 3";
  tool = await ToolProcess.start("sh", ["-c", script], dir);
  await until("the tool has spoken", () => tool.describeExit().includes("connected to json:"));
});

afterEach(async () => {
  await tool[Symbol.asyncDispose]();
  await rm(dir, { recursive: true, force: true });
});

async function letItEnd(): Promise<void> {
  await writeFile(path.join(dir, "go"), "");
  await until("the tool ends", () => tool.hasExited);
}

describe("ToolProcess.describeExit()", () => {
  it("tells the status, and all that was said", async () => {
    await letItEnd();
    expect(tool.describeExit()).toBe("ended with status 3: is now connected to json: lost it");
  });

  it("tells what was said since the output was forgotten", async () => {
    tool.forgetOutput();
    await letItEnd();
    expect(tool.describeExit()).toBe("ended with status 3: lost it");
  });

  it("tells the signal alone when nothing was said since", async () => {
    tool.forgetOutput();
    process.kill(tool.pid, "SIGKILL");
    await until("the tool ends", () => tool.hasExited);
    expect(tool.describeExit()).toBe("was ended by SIGKILL");
  });
});
