// SPDX-License-Identifier: AGPL-3.0-or-later
// The store's JSON files as docs/store-format.md describes them, written down a second time as JSON Schema.
import { Ajv } from "ajv";

const ajv = new Ajv({ strict: false });

const uuid = { type: "string", pattern: "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$" };
const count = { type: "integer", minimum: 0, maximum: 9007199254740991 };
const upTo = (maximum: number) => ({ type: "integer", minimum: 0, maximum });
const line = { type: "string", pattern: "^[^\\n\\r]{0,1000}$" };
const storeid = { type: "string", pattern: "^[A-Za-z][A-Za-z0-9._-]{0,99}$" };
const time = { type: "string", pattern: "^[0-9TZ:.-]{1,40}$" };
const ticks = { type: "string", pattern: "^[0-9]{1,20}$" };
const fileName = { type: "string", pattern: "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$" };
const sha256 = { type: "string", pattern: "^[0-9a-f]{64}$" };

/** Every property is wanted, except those behind a "?". Unknown ones are ignored. */
function object(properties: Readonly<Record<string, object>>): object {
  const names = Object.keys(properties);
  return {
    type: "object",
    properties: Object.fromEntries(names.map((name) => [name.replace("?", ""), properties[name]])),
    required: names.filter((name) => !name.endsWith("?")),
  };
}

const head = (format: string): Record<string, object> => ({ format: { const: format }, version: { const: 1 } });
const process = object({ bootId: uuid, pid: count, startTime: ticks });
const guest = object({ "vmgenid?": uuid, "process?": process });
const digest = {
  oneOf: [
    object({ algorithm: { const: "sha256" }, value: sha256 }),
    object({ algorithm: { const: "xxh3-128" }, value: { type: "string", pattern: "^[0-9a-f]{32}$" } }),
  ],
};
const base = object({ folder: { type: "string", pattern: "^(qemu|lxc)-(0|[1-9][0-9]{0,11})$" }, uuid });
const device = {
  ...object({
    ...{ name: { type: "string", pattern: "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$" }, file: fileName, virtualBytes: count },
    ...{ mode: { enum: ["full", "incremental"] }, reason: line, "base?": base },
    ...{ compression: { type: "string", pattern: "^[a-z0-9-]{1,32}$" }, headerSha256: sha256 },
    ...{ readBytes: count, writtenBytes: count, zeroBytes: count },
  }),
  if: { type: "object", properties: { mode: { const: "incremental" } } },
  // biome-ignore lint/suspicious/noThenProperty: the word of JSON Schema
  then: { type: "object", required: ["base"] },
  else: { type: "object", not: { required: ["base"] } },
};
const container = object({
  archive: { enum: ["archive.tar", "archive.tar.gz", "archive.tar.zst", "archive.sqfs"] },
  ...{ members: count, totalBytes: count, hasSbin: { type: "boolean" }, warnings: count },
});

export const SHAPES = {
  manifest: object({
    ...head("pve-backup-host-manifest"),
    ...{ uuid, sequence: upTo(2 ** 40), vmid: upTo(999_999_999), type: { enum: ["qemu", "lxc"] } },
    ...{ epoch: upTo(999_999_999_999), storeid, nodename: line, committedAt: line, guest, "container?": container },
    devices: { type: "array", maxItems: 500, items: device },
    files: { type: "array", maxItems: 1000, items: object({ name: fileName, sizeBytes: count, "digest?": digest }) },
  }),
  state: object({
    ...head("pve-backup-host-state"),
    sequence: upTo(2 ** 40),
    newest: {
      type: "object",
      maxProperties: 1000,
      propertyNames: storeid,
      additionalProperties: object({
        uuid,
        archive: { type: "string", pattern: "^[1-9][0-9]{2,8}/(qemu|lxc)-[0-9]{1,12}$" },
      }),
    },
  }),
  witness: object({
    ...head("pve-backup-host-witness"),
    ...{ storeid, vmid: upTo(999_999_999), "settled?": uuid, "inFlight?": uuid, guest },
    foreign: { type: "array", maxItems: 5000, items: { type: "string" } },
  }),
  lock: object({
    ...head("pve-backup-host-lock"),
    ...{ uuid, hostId: { type: "string", pattern: "^[0-9a-f]{32}$" }, process, since: time, heartbeat: count },
    hostname: { type: "string", pattern: "^[^\\n]{0,255}$" },
  }),
  attributes: object({
    ...head("pve-backup-host-attributes"),
    ...{ "notes?": { type: "string" }, "protected?": { type: "boolean" } },
    "verify?": object({ state: { enum: ["ok", "failed"] }, at: time, "message?": { type: "string" } }),
  }),
} as const;

/** A field that is null counts as one that is not there; an entry whose name is data does not. */
function withoutNulls(value: unknown, isMap = false): unknown {
  if (Array.isArray(value)) return value.map((one) => withoutNulls(one));
  if (typeof value !== "object" || value === null) return value;
  const held = Object.entries(value).filter(([, one]) => isMap || one !== null);
  return Object.fromEntries(held.map(([name, one]) => [name, withoutNulls(one, name === "newest")]));
}

/** Whether a text is JSON of this shape. */
export function fits(shape: keyof typeof SHAPES): (text: string) => boolean {
  const validate = ajv.compile(SHAPES[shape]);
  return (text) => {
    try {
      return validate(withoutNulls(JSON.parse(text))) === true;
    } catch {
      return false;
    }
  };
}
