// SPDX-License-Identifier: AGPL-3.0-or-later
// Tests that need a system program say so, and say so again when they are skipped.
import { accessSync, constants } from "node:fs";
import path from "node:path";
import type { TestContext } from "vitest";

/** True if `command` can be started from PATH. */
export function hasTool(command: string): boolean {
  return (process.env.PATH ?? "").split(path.delimiter).some((folder) => {
    try {
      accessSync(path.join(folder, command), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** Skips the running test with a printed reason if a tool is missing; with REQUIRE_TOOLS=1 it fails instead. */
export function requireTool(context: TestContext, ...commands: string[]): void {
  const missing = commands.filter((command) => !hasTool(command));
  if (missing.length > 0) skipOrFail(context, `needs ${missing.join(", ")}`);
}

/** The same if the test does not run as root. */
export function requireRoot(context: TestContext): void {
  if (process.getuid?.() !== 0) skipOrFail(context, "needs root");
}

function skipOrFail(context: TestContext, reason: string): void {
  if (process.env.REQUIRE_TOOLS === "1") throw new Error(`This test ${reason}`);
  console.info(`skipped: ${context.task.name}: ${reason}`);
  context.skip(reason);
}
