// SPDX-License-Identifier: AGPL-3.0-or-later
// What must hold after every failed operation, whatever job it belonged to.
import { readdir, readFile } from "node:fs/promises";
import { expect } from "vitest";
import { toRpcError } from "../../../bridge/error-map.ts";
import { processesNaming } from "../programs/processes.ts";
import type { FaultKind } from "./fault-fs.ts";

/** The changes made by taking and releasing a reader's lock; those of a whole restore with a directory for mounts. */
const KINDS_OF_A_LOCK: readonly FaultKind[] = ["close", "create", "link", "mkdir", "sync", "unlink", "write"];
export const KINDS_OF_A_RESTORE: readonly FaultKind[] = [...KINDS_OF_A_LOCK, "rename", "rmdir"];

/** Far above what it takes: a device is free when the last process that had it open has closed it. */
const DEVICE_TIMEOUT_MS = 30_000;

/** One line that names what could not be done, and nothing that belongs to the test. */
export function expectSentence(message: string): void {
  expect(message).toMatch(/^Cannot [^\n]*[^:\s]$/);
  expect(message).not.toMatch(/undefined|\[object|injected/);
}

/** What PVE gets to see of `error`: one clear sentence. */
export function sentenceOf(error: unknown): string {
  const { data, message } = toRpcError(error);
  expect(data.code, message).not.toBe("INTERNAL");
  expectSentence(message);
  return message;
}

/** @throws if a process, a mount or a loop device still uses anything below `folder` */
export async function expectNothingRuns(folder: string): Promise<void> {
  expect(await processesNaming(folder)).toEqual([]);
  expect(await readFile("/proc/self/mountinfo", "utf8")).not.toContain(folder);
  await expect.poll(() => loopDevicesOf(folder), { timeout: DEVICE_TIMEOUT_MS }).toEqual([]);
}

/** Loop devices whose file is below `folder`. */
async function loopDevicesOf(folder: string): Promise<string[]> {
  const found: string[] = [];
  for (const device of await readdir("/sys/block")) {
    const file = await readFile(`/sys/block/${device}/loop/backing_file`, "utf8").catch(() => "");
    if (file.startsWith(`${folder}/`)) found.push(`/dev/${device}: ${file.trim()}`);
  }
  return found;
}
