// SPDX-License-Identifier: AGPL-3.0-or-later
// state.json of one guest: the highest commit sequence ever given out, also to points that are gone.
// A convenience of the store; what decides about bases is the witness.
import { join } from "node:path";
import { environmentError, errnoOf, messageOf } from "../core/index.ts";
import type { DurableIo } from "./durable.ts";
import { checkFormat, Fields, formatJson, JsonProblem, parseJson, readSmallFile } from "./json.ts";
import { STATE_FILE, STOREID_PATTERN, UUID_PATTERN } from "./layout.ts";
import { MAX_SEQUENCE } from "./manifest.ts";

export interface NewestPoint {
  readonly uuid: string;
  readonly archive: string;
}

export interface GuestState {
  readonly sequence: number;
  /** By storage id. */
  readonly newest: ReadonlyMap<string, NewestPoint>;
}

const STATE_FORMAT = "pve-backup-host-state";
const STATE_VERSION = 1;
const MAX_STATE_BYTES = 1024 * 1024;
const MAX_STORAGE_IDS = 1000;

/** @throws JsonProblem */
export function parseState(bytes: Buffer): GuestState {
  const fields = new Fields(parseJson(bytes));
  checkFormat(fields, STATE_FORMAT, STATE_VERSION);
  const entries = fields.object("newest").entries();
  if (entries.length > MAX_STORAGE_IDS) throw fields.problem("newest", "has too many entries");
  const newest = new Map<string, NewestPoint>();
  for (const [storeid, value] of entries) {
    if (!STOREID_PATTERN.test(storeid)) throw fields.problem("newest", "names something that is no storage id");
    const point = new Fields(value, `newest.${storeid}`);
    newest.set(storeid, {
      uuid: point.text("uuid", UUID_PATTERN),
      archive: point.text("archive", /^[1-9][0-9]{2,8}\/(?:qemu|lxc)-[0-9]{1,12}$/),
    });
  }
  return { sequence: fields.count("sequence", MAX_SEQUENCE), newest };
}

/**
 * The state of a guest; a missing or damaged file counts as empty: the manifests know the rest.
 *
 * @throws EnvironmentError if the file is there and cannot be read
 */
export async function readState(folder: string, warn: (message: string) => void): Promise<GuestState> {
  const path = join(folder, STATE_FILE);
  try {
    return parseState(await readSmallFile(path, MAX_STATE_BYTES));
  } catch (error) {
    if (errnoOf(error) !== "ENOENT" && !(error instanceof JsonProblem)) throw environmentError("read", path, error);
    if (error instanceof JsonProblem) warn(`Cannot use "${path}": ${messageOf(error)}; the manifests count`);
    return { sequence: 0, newest: new Map() };
  }
}

export async function writeState(folder: string, state: GuestState, io: DurableIo): Promise<void> {
  const newest = Object.fromEntries(state.newest);
  const value = { format: STATE_FORMAT, version: STATE_VERSION, sequence: state.sequence, newest };
  await io.replaceFile(join(folder, STATE_FILE), formatJson(value));
}
