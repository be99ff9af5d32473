// SPDX-License-Identifier: AGPL-3.0-or-later
// Removes what raw views of dead processes left behind: servers, /dev/nbdX nodes, mounts, directories.
import { readdir } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { environmentError, errnoOf, messageOf } from "../core/index.ts";
import { isRunning, type ProcessIdentity, readProcess } from "../host/index.ts";
import { type NbdHost, nbdHost } from "./nbd-host.ts";
import { waitForRelease } from "./nbd-release.ts";
import { readOwnerRecord } from "./owner-record.ts";
import { removeViewFolder, VIEW_FOLDER } from "./view-folder.ts";

const TERM_TIMEOUT_MS = 2_000;
const POLL_MS = 20;

/**
 * Removes every view below `runDir` whose owner is dead; views of living processes stay. What cannot be removed causes
 * a warning and is left for the next sweep. If `runDir` is missing, there is nothing to do.
 *
 * @throws EnvironmentError if the directory cannot be read
 */
export async function sweepRawViews(
  runDir: string,
  warn: (message: string) => void,
  host: NbdHost = nbdHost(),
): Promise<void> {
  const absolute = path.resolve(runDir);
  let names: string[];
  try {
    names = await readdir(absolute);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return;
    throw environmentError("read the folder", absolute, error);
  }
  for (const name of names) {
    try {
      await sweepOne(absolute, name, host);
    } catch (error) {
      warn(messageOf(error)); // it does no harm
    }
  }
}

async function sweepOne(runDir: string, name: string, host: NbdHost): Promise<void> {
  const pid = VIEW_FOLDER.exec(name)?.[1];
  if (pid === undefined) return; // not ours
  const folder = path.join(runDir, name);
  const record = await readOwnerRecord(folder);
  // Without a record it is being created right now, or its creator died between two steps.
  const isOwned = record === undefined ? (await readProcess(Number(pid))) !== undefined : await isRunning(record.owner);
  if (isOwned) return;
  const children = record?.children ?? [];
  for (const child of children) await endProcess(child);
  const servers = children.map((child) => child.pid);
  if (record?.nbdNode !== undefined) await waitForRelease(host, record.nbdNode, servers);
  await removeViewFolder(folder);
}

async function endProcess(identity: ProcessIdentity): Promise<void> {
  for (const signal of ["SIGTERM", "SIGKILL"] as const) {
    if (!(await isRunning(identity))) return;
    try {
      process.kill(identity.pid, signal);
    } catch (error) {
      if (errnoOf(error) !== "ESRCH") throw error;
    }
    const endMs = performance.now() + TERM_TIMEOUT_MS;
    while (performance.now() < endMs && (await isRunning(identity))) await sleep(POLL_MS);
  }
}
