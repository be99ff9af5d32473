// SPDX-License-Identifier: AGPL-3.0-or-later
// The only place where the protocol's shapes (PVE's kebab-case keys, base64) turn into the provider's (camelCase,
// Buffers, Maps) and back. Everything here has been checked against the schema before.
import type {
  AttributeValue,
  BitmapMode,
  ContainerBackupInfo,
  DeviceSizes,
  GuestType,
  HandleReference,
  HandleToOpen,
  KeepOptions,
  VmBackupInfo,
  VmVolume,
  VolumeEntry,
  VolumeInfo,
} from "../src/provider/index.ts";

interface WireVmVolume {
  readonly size: number;
  readonly "bitmap-mode": BitmapMode;
  readonly "nbd-path"?: string;
  readonly "bitmap-name"?: string;
  readonly "file-handle"?: HandleReference;
}

interface WireVmInfo {
  readonly "bandwidth-limit"?: number;
  readonly "firewall-config"?: string;
}

interface WireContainerInfo extends WireVmInfo {
  readonly directory: string;
  readonly sources: readonly string[];
  readonly "backup-user-id": number;
}

interface WireKeep {
  readonly "keep-all"?: number;
  readonly "keep-last"?: number;
  readonly "keep-hourly"?: number;
  readonly "keep-daily"?: number;
  readonly "keep-weekly"?: number;
  readonly "keep-monthly"?: number;
  readonly "keep-yearly"?: number;
}

type WireSizes = Readonly<Record<string, { readonly size: number }>>;

/** The params of every request, as the schema has them. */
export interface WireParams {
  readonly vmid: number;
  readonly vmtype: GuestType;
  readonly "start-time": number;
  readonly success: boolean;
  readonly error?: string;
  readonly filename: string;
  readonly volumes: Readonly<Record<string, WireVmVolume>>;
  readonly "guest-config": string;
  readonly "exclude-patterns": readonly string[];
  readonly info: WireContainerInfo;
  readonly handles: readonly number[];
  readonly volname: string;
  readonly "device-name": string;
  readonly attribute: string;
  readonly value: string | number | null;
  readonly keep: WireKeep;
  readonly type: GuestType;
  readonly dryrun: boolean;
}

export function decodeBytes(base64: string): Buffer {
  return Buffer.from(base64, "base64");
}

export function encodeBytes(bytes: Buffer): string {
  return bytes.toString("base64");
}

/** An empty firewall config counts as one: PVE passes "" where the file is empty. */
function decodeOptionalBytes(base64: string | undefined): Buffer | undefined {
  return base64 === undefined ? undefined : decodeBytes(base64);
}

export function decodeVmVolumes(volumes: Readonly<Record<string, WireVmVolume>>): ReadonlyMap<string, VmVolume> {
  return new Map(
    Object.entries(volumes).map(([device, volume]) => [
      device,
      {
        size: volume.size,
        bitmapMode: volume["bitmap-mode"],
        nbdPath: volume["nbd-path"],
        bitmapName: volume["bitmap-name"],
        ...(volume["file-handle"] === undefined ? {} : { fileHandle: volume["file-handle"] }),
      },
    ]),
  );
}

export function decodeSizes(sizes: WireSizes): DeviceSizes {
  return new Map(Object.entries(sizes).map(([device, { size }]) => [device, { size }]));
}

export function encodeSizes(sizes: DeviceSizes): WireSizes {
  return Object.fromEntries([...sizes].map(([device, { size }]) => [device, { size }]));
}

export function decodeVmInfo(info: WireVmInfo): VmBackupInfo {
  return {
    bandwidthLimit: info["bandwidth-limit"] ?? 0,
    firewallConfig: decodeOptionalBytes(info["firewall-config"]),
  };
}

export function decodeContainerInfo(info: WireContainerInfo): ContainerBackupInfo {
  return {
    directory: info.directory,
    sources: info.sources,
    backupUserId: info["backup-user-id"],
    ...decodeVmInfo(info),
  };
}

export function encodeHandle(handle: HandleToOpen): Record<string, unknown> {
  const { kind, path } = handle;
  return kind === "socket" && handle.firstLine !== undefined
    ? { kind, path, "first-line": handle.firstLine }
    : { kind, path };
}

export function decodeKeep(keep: WireKeep): KeepOptions {
  return {
    all: keep["keep-all"] === 1,
    last: keep["keep-last"] ?? 0,
    hourly: keep["keep-hourly"] ?? 0,
    daily: keep["keep-daily"] ?? 0,
    weekly: keep["keep-weekly"] ?? 0,
    monthly: keep["keep-monthly"] ?? 0,
    yearly: keep["keep-yearly"] ?? 0,
  };
}

export function decodeAttributeValue(value: string | number | null): AttributeValue {
  return value ?? undefined;
}

export function encodeAttributeValue(value: AttributeValue): string | number | null {
  return value ?? null;
}

/** Names every key, so a field added to VolumeEntry is not sent by accident. */
export function encodeVolumeEntry(entry: VolumeEntry): Record<string, unknown> {
  return {
    volname: entry.volname,
    vmid: entry.vmid,
    subtype: entry.subtype,
    ctime: entry.ctime,
    size: entry.size,
    format: entry.format,
    protected: entry.protected,
    ...(entry.notes === undefined ? {} : { notes: entry.notes }),
    ...(entry.parent === undefined ? {} : { parent: entry.parent }),
  };
}

/** Likewise. */
export function encodeVolumeInfo({ size, used, format, parent }: VolumeInfo): Record<string, unknown> {
  return { size, used, format, ...(parent === undefined ? {} : { parent }) };
}
