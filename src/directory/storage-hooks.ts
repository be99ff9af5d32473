// SPDX-License-Identifier: AGPL-3.0-or-later
// What the storage plugin asks: the points of the store in the words of PVE's listing, their attributes, their retention.
import { RequestError, UnsupportedError } from "../core/index.ts";
import { prune } from "../maintenance/index.ts";
import type {
  AttributeValue,
  PruneEntry,
  PruneRequest,
  StorageHooks,
  VolumeEntry,
  VolumeInfo,
} from "../provider/index.ts";
import type { StorageAccess } from "./storage-access.ts";
import { toVolumeEntry, toVolumeInfo } from "./volumes.ts";

export class DirectoryStorageHooks implements StorageHooks {
  readonly #access: StorageAccess;

  constructor(access: StorageAccess) {
    this.#access = access;
  }

  async listVolumes(vmid: number | undefined, signal: AbortSignal): Promise<VolumeEntry[]> {
    const store = await this.#access.openStore();
    const points = await store.listPoints(vmid === undefined ? {} : { vmid }, signal);
    return points.map(toVolumeEntry);
  }

  async volumeInfo(volname: string, signal: AbortSignal): Promise<VolumeInfo> {
    const store = await this.#access.openStore();
    return toVolumeInfo(await store.openPoint(volname, signal));
  }

  async getVolumeAttribute(volname: string, attribute: string, signal: AbortSignal): Promise<AttributeValue> {
    if (attribute !== "notes" && attribute !== "protected") return undefined;
    const store = await this.#access.openStore();
    const attributes = await store.readAttributes(volname, signal);
    return attribute === "notes" ? (attributes.notes ?? "") : Number(attributes.protected);
  }

  async updateVolumeAttribute(
    volname: string,
    attribute: string,
    value: AttributeValue,
    signal: AbortSignal,
  ): Promise<void> {
    const store = await this.#access.openStore();
    if (attribute === "notes") {
      await store.updateAttributes(volname, { notes: value === undefined ? "" : String(value) }, signal);
    } else if (attribute === "protected") {
      await store.updateAttributes(volname, { protected: value !== undefined && Number(value) !== 0 }, signal);
    } else {
      throw new RequestError(`Cannot set attribute "${attribute}": a backup has "notes" and "protected" only`);
    }
  }

  freeVolume(volname: string): Promise<void> {
    return Promise.reject(
      new UnsupportedError(
        `Cannot remove "${volname}": removing backups is not part of this version, nothing was removed`,
      ),
    );
  }

  async pruneBackups({ keep, vmid, type, dryrun }: PruneRequest, signal: AbortSignal): Promise<PruneEntry[]> {
    const volumes = (await this.listVolumes(vmid, signal)).filter(
      ({ subtype }) => type === undefined || subtype === type,
    );
    const entries = await prune(volumes, keep, undefined);
    const count = entries.filter(({ mark }) => mark === "remove").length;
    if (count > 0 && !dryrun) {
      throw new UnsupportedError(
        "Cannot prune backups: removing backups is not supported by this version, nothing was removed, " +
          `${count} backup(s) exceed the retention`,
        { hint: "set prune-backups to keep-all=1 for this storage" },
      );
    }
    return entries;
  }
}
