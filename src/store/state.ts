// SPDX-License-Identifier: AGPL-3.0-or-later
// state.json of one guest: what the store gave out, including to points that are gone. It has the highest commit
// sequence, and for each storage id the point that was committed last: a third witness beside the one outside the
// store and the points themselves.

import { environmentError, errnoOf, isUuid, messageOf } from "../core/index.ts";
import { FileProblem, type Folder } from "../host/index.ts";
import { isArchiveName, STOREID_PATTERN } from "../pve/index.ts";
import type { DurableIo } from "./durable.ts";
import { checkFormat, Fields, formatJson, parseJson } from "./format/json.ts";
import { STATE_FILE } from "./format/layout.ts";
import { MAX_SEQUENCE } from "./format/manifest.ts";

interface NewestPoint {
  readonly uuid: string;
  readonly archive: string;
}

interface GuestState {
  readonly sequence: number;
  /** By storage id. */
  readonly newest: ReadonlyMap<string, NewestPoint>;
}

const STATE_FORMAT = "pve-backup-host-state";
const STATE_VERSION = 1;
const MAX_STATE_BYTES = 1024 * 1024;
const MAX_STORAGE_IDS = 1000;

/** @throws FileProblem */
export function parseState(bytes: Buffer): GuestState {
  const fields = new Fields(parseJson(bytes));
  checkFormat(fields, STATE_FORMAT, STATE_VERSION);
  const entries = fields.object("newest").entries();
  if (entries.length > MAX_STORAGE_IDS) throw fields.problem("newest", "has too many entries");
  const newest = new Map<string, NewestPoint>();
  for (const [storeid, value] of entries) {
    if (!STOREID_PATTERN.test(storeid)) throw fields.problem("newest", "names something that is not a storage id");
    const point = new Fields(value, `newest.${storeid}`);
    newest.set(storeid, {
      uuid: point.text("uuid", isUuid),
      archive: point.text("archive", isArchiveName),
    });
  }
  return { sequence: fields.count("sequence", MAX_SEQUENCE), newest };
}

/** What was found: nothing, a state, or a file that cannot be understood. */
export type FoundState =
  | { readonly kind: "none" }
  | { readonly kind: "damaged"; readonly reason: string }
  | { readonly kind: "state"; readonly state: GuestState };

/** @throws EnvironmentError if the file is there and cannot be read */
export async function readState(folder: Folder): Promise<FoundState> {
  try {
    return { kind: "state", state: parseState(await folder.readFile(STATE_FILE, MAX_STATE_BYTES)) };
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return { kind: "none" };
    if (error instanceof FileProblem) return { kind: "damaged", reason: messageOf(error) };
    throw environmentError("read", folder.pathOf(STATE_FILE), error);
  }
}

export async function writeState(folder: Folder, state: GuestState, io: DurableIo): Promise<void> {
  const newest = Object.fromEntries(state.newest);
  const value = { format: STATE_FORMAT, version: STATE_VERSION, sequence: state.sequence, newest };
  await io.replaceFile(folder, STATE_FILE, formatJson(value));
}
