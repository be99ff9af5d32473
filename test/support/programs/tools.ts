// SPDX-License-Identifier: AGPL-3.0-or-later
// Tests that need a program of the system say so, and say so again when they are skipped.
import { execFileSync } from "node:child_process";
import type { TestContext } from "vitest";

/** True if `command` can be started from PATH. */
export function hasTool(command: string): boolean {
  try {
    execFileSync("which", [command], { stdio: "ignore" });
    return true;
  } catch {
    return false;
  }
}

/** Skips the running test with a printed reason if a tool is missing; with REQUIRE_TOOLS=1 it fails instead. */
export function requireTool(context: TestContext, ...commands: string[]): void {
  const missing = commands.filter((command) => !hasTool(command));
  if (missing.length === 0) return;
  const reason = `needs ${missing.join(", ")}`;
  if (process.env.REQUIRE_TOOLS === "1") throw new Error(`This test ${reason}`);
  console.info(`skipped: ${context.task.name}: ${reason}`);
  context.skip(reason);
}
