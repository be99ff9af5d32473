// SPDX-License-Identifier: AGPL-3.0-or-later
// attributes.json: what may change after the commit. It is separate from the manifest, so new notes never rewrite the
// manifest.
import { errnoOf, messageOf, RequestError } from "../core/index.ts";
import type { Folder } from "../host/index.ts";
import type { DurableIo } from "./durable.ts";
import { checkFormat, Fields, formatJson, parseJson } from "./format/json.ts";
import { ATTRIBUTES_FILE } from "./format/layout.ts";

export interface Attributes {
  readonly notes?: string;
  /** A protected point is never removed. */
  readonly protected: boolean;
  readonly verify?: VerifyState;
}

/** Result of the last verification. */
interface VerifyState {
  readonly state: "ok" | "failed";
  /** ISO 8601. */
  readonly at: string;
  readonly message?: string;
}

const MAX_NOTES_BYTES = 128 * 1024;
const MAX_ATTRIBUTES_BYTES = 1024 * 1024;
const ATTRIBUTES_FORMAT = "pve-backup-host-attributes";
const ATTRIBUTES_VERSION = 1;

/** @throws FileProblem */
export function parseAttributes(bytes: Buffer): Attributes {
  const fields = new Fields(parseJson(bytes));
  checkFormat(fields, ATTRIBUTES_FORMAT, ATTRIBUTES_VERSION);
  const notes = fields.optionalText("notes", /^/);
  const verify = fields.has("verify") ? parseVerify(fields.object("verify")) : undefined;
  return {
    ...(notes === undefined ? {} : { notes }),
    protected: fields.has("protected") ? fields.flag("protected") : false,
    ...(verify === undefined ? {} : { verify }),
  };
}

function parseVerify(fields: Fields): VerifyState {
  const message = fields.optionalText("message", /^/);
  return {
    state: fields.oneOf("state", ["ok", "failed"]),
    at: fields.text("at", /^[0-9TZ:.-]{1,40}$/),
    ...(message === undefined ? {} : { message }),
  };
}

/**
 * The attributes of a point. A missing file means that there are none; a file that cannot be understood counts as
 * protected, because it may have said so.
 */
export async function readAttributes(folder: Folder, warn: (message: string) => void): Promise<Attributes> {
  try {
    return parseAttributes(await folder.readFile(ATTRIBUTES_FILE, MAX_ATTRIBUTES_BYTES));
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return { protected: false };
    warn(`Cannot read the attributes of "${folder.path}": ${messageOf(error)}; it counts as protected`);
    return { protected: true };
  }
}

/** @throws RequestError for notes that are too long, EnvironmentError */
export async function writeAttributes(folder: Folder, attributes: Attributes, io: DurableIo): Promise<void> {
  const notesBytes = Buffer.byteLength(attributes.notes ?? "");
  if (notesBytes > MAX_NOTES_BYTES) {
    throw new RequestError(`Cannot store notes: they have ${notesBytes} bytes, at most ${MAX_NOTES_BYTES} are allowed`);
  }
  const value = { format: ATTRIBUTES_FORMAT, version: ATTRIBUTES_VERSION, ...attributes };
  await io.replaceFile(folder, ATTRIBUTES_FILE, formatJson(value));
}
