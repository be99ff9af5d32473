// SPDX-License-Identifier: AGPL-3.0-or-later
// manifest.json: what a point is. Written once, inside the staging directory, before the commit rename.
// docs/store-format.md describes every field.

import { isUuid, oneLine } from "../../core/index.ts";
import type { Digest } from "../../digest/index.ts";
import { FileProblem } from "../../host/index.ts";
import { type GuestIdentity, isDeviceName, isFolderName, type PointType, STOREID_PATTERN } from "../../pve/index.ts";
import { checkFormat, Fields, formatJson, parseJson } from "./json.ts";
import { CONTAINER_ARCHIVE_PATTERN, isPlainFileName } from "./layout.ts";

const MANIFEST_FORMAT = "pve-backup-host-manifest";
const MANIFEST_VERSION = 1;
/** Far above what any store reaches, far below where adding one stops working. */
export const MAX_SEQUENCE = 2 ** 40;
const MAX_FILES = 1000;
const MAX_DEVICES = 500;
const SHA256_PATTERN = /^[0-9a-f]{64}$/;
const XXH3_PATTERN = /^[0-9a-f]{32}$/;
const MAX_LINE_CHARS = 1000;
const LINE_PATTERN = new RegExp(`^[^\\n\\r]{0,${MAX_LINE_CHARS}}$`);

export type DeviceMode = "full" | "incremental";

export interface ManifestBase {
  /** Directory of the base, beside this one: "qemu-1700000000". */
  readonly folder: string;
  readonly uuid: string;
}

export interface ManifestDevice {
  readonly name: string;
  readonly file: string;
  readonly virtualBytes: number;
  readonly mode: DeviceMode;
  /** Why all of the device was read; empty if only what changed was. */
  readonly reason: string;
  readonly base?: ManifestBase;
  readonly compression: string;
  readonly readBytes: number;
  readonly writtenBytes: number;
  readonly zeroBytes: number;
  /** SHA-256 of the first 64 KiB of the file: the header as it was committed. */
  readonly headerSha256: string;
}

export interface ManifestFile {
  readonly name: string;
  readonly sizeBytes: number;
  readonly digest?: Digest;
}

/** What the archive of a container held when it was read back before the commit. */
export interface ManifestContainer {
  readonly archive: string;
  /** Files, directories and everything else that it lists. */
  readonly members: number;
  /** Sum of the members' sizes. */
  readonly totalBytes: number;
  /** Without a member "sbin" Proxmox VE refuses to restore it. */
  readonly hasSbin: boolean;
  /** How many warnings the archiver gave: files that changed or vanished while they were read. */
  readonly warnings: number;
}

export interface Manifest {
  readonly uuid: string;
  readonly sequence: number;
  readonly vmid: number;
  readonly type: PointType;
  readonly epoch: number;
  readonly storeid: string;
  readonly nodename: string;
  /** Wall clock at commit, ISO 8601; for people only. */
  readonly committedAt: string;
  readonly guest: GuestIdentity;
  readonly devices: readonly ManifestDevice[];
  /** Present for containers. */
  readonly container?: ManifestContainer;
  readonly files: readonly ManifestFile[];
}

/** Makes a text fit a field of one line: the reason of a full backup may quote an error of any length. */
export function cutLine(text: string): string {
  const line = oneLine(text);
  return line.length <= MAX_LINE_CHARS ? line : `${line.slice(0, MAX_LINE_CHARS - 3)}...`;
}

export function formatManifest(manifest: Manifest): Buffer {
  return formatJson({ format: MANIFEST_FORMAT, version: MANIFEST_VERSION, ...manifest });
}

/**
 * Inverse of formatManifest().
 *
 * @throws FileProblem saying what is wrong
 */
export function parseManifest(bytes: Buffer): Manifest {
  const fields = new Fields(parseJson(bytes));
  checkFormat(fields, MANIFEST_FORMAT, MANIFEST_VERSION);
  const container = fields.has("container") ? parseContainer(fields.object("container")) : undefined;
  const manifest: Manifest = {
    uuid: fields.text("uuid", isUuid),
    sequence: fields.count("sequence", MAX_SEQUENCE),
    vmid: fields.count("vmid", 999_999_999),
    type: fields.oneOf("type", ["qemu", "lxc"]),
    epoch: fields.count("epoch", 999_999_999_999),
    storeid: fields.text("storeid", STOREID_PATTERN),
    nodename: fields.text("nodename", LINE_PATTERN),
    committedAt: fields.text("committedAt", LINE_PATTERN),
    guest: parseGuestIdentity(fields.object("guest")),
    devices: fields.list("devices", MAX_DEVICES).map((one, at) => parseDevice(new Fields(one, `devices[${at}]`))),
    ...(container === undefined ? {} : { container }),
    files: fields.list("files", MAX_FILES).map((one, at) => parseFile(new Fields(one, `files[${at}]`))),
  };
  checkConsistent(manifest);
  return manifest;
}

/** The `guest` object of manifests and witnesses. */
export function parseGuestIdentity(fields: Fields): GuestIdentity {
  const vmgenid = fields.optionalText("vmgenid", isUuid);
  const process = fields.has("process") ? fields.object("process") : undefined;
  return {
    ...(vmgenid === undefined ? {} : { vmgenid }),
    ...(process === undefined
      ? {}
      : {
          process: {
            bootId: process.text("bootId", isUuid),
            pid: process.count("pid"),
            startTime: process.text("startTime", /^[0-9]{1,20}$/),
          },
        }),
  };
}

function parseDevice(fields: Fields): ManifestDevice {
  const mode = fields.oneOf<DeviceMode>("mode", ["full", "incremental"]);
  const base = fields.has("base") ? fields.object("base") : undefined;
  if ((mode === "incremental") !== (base !== undefined)) throw fields.problem("base", "does not fit the mode");
  const name = fields.text("name", /^/);
  if (!isDeviceName(name)) throw fields.problem("name", "is not a device name");
  return {
    name,
    file: plainFile(fields, "file"),
    virtualBytes: fields.count("virtualBytes"),
    mode,
    reason: fields.text("reason", LINE_PATTERN),
    ...(base === undefined
      ? {}
      : { base: { folder: base.text("folder", isFolderName), uuid: base.text("uuid", isUuid) } }),
    compression: fields.text("compression", /^[a-z0-9-]{1,32}$/),
    readBytes: fields.count("readBytes"),
    writtenBytes: fields.count("writtenBytes"),
    zeroBytes: fields.count("zeroBytes"),
    headerSha256: fields.text("headerSha256", SHA256_PATTERN),
  };
}

function parseContainer(fields: Fields): ManifestContainer {
  return {
    archive: fields.text("archive", CONTAINER_ARCHIVE_PATTERN),
    members: fields.count("members"),
    totalBytes: fields.count("totalBytes"),
    hasSbin: fields.flag("hasSbin"),
    warnings: fields.count("warnings"),
  };
}

function parseFile(fields: Fields): ManifestFile {
  const digest = fields.has("digest") ? parseDigest(fields.object("digest")) : undefined;
  return {
    name: plainFile(fields, "name"),
    sizeBytes: fields.count("sizeBytes"),
    ...(digest === undefined ? {} : { digest }),
  };
}

function parseDigest(fields: Fields): Digest {
  const algorithm = fields.oneOf("algorithm", ["xxh3-128", "sha256"]);
  return { algorithm, value: fields.text("value", algorithm === "sha256" ? SHA256_PATTERN : XXH3_PATTERN) };
}

function plainFile(fields: Fields, name: string): string {
  const file = fields.text(name, /^/);
  if (!isPlainFileName(file)) throw fields.problem(name, "is not a plain file name");
  return file;
}

function checkConsistent(manifest: Manifest): void {
  const files = new Set(manifest.files.map((file) => file.name));
  if (files.size !== manifest.files.length) throw new FileProblem("a file is listed twice");
  if (manifest.container !== undefined) {
    if (manifest.type !== "lxc") throw new FileProblem("it records an archive, but is not of a container");
    if (!files.has(manifest.container.archive)) throw new FileProblem("the container's archive is not listed");
  }
  const names = new Set<string>();
  for (const device of manifest.devices) {
    if (names.has(device.name)) throw new FileProblem(`device ${device.name} is listed twice`);
    names.add(device.name);
    if (!files.has(device.file)) throw new FileProblem(`the file of device ${device.name} is not listed`);
    if (device.base !== undefined && device.base.uuid === manifest.uuid) {
      throw new FileProblem(`device ${device.name} is its own base`);
    }
  }
}
