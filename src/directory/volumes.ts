// SPDX-License-Identifier: AGPL-3.0-or-later
// Points of the store in the words of PVE's storage listing.

import type { BackupProvider, VolumeEntry } from "../provider/index.ts";
import type { Point, PointEntry } from "../store/index.ts";

export function toVolumeEntry(entry: PointEntry): VolumeEntry {
  return {
    volname: entry.volname,
    vmid: entry.vmid,
    subtype: entry.type,
    ctime: entry.epoch,
    size: Math.max(1, entry.occupiedBytes),
    format: "directory",
    protected: entry.protected,
    ...(entry.notes === undefined ? {} : { notes: entry.notes }),
    ...(entry.parent === undefined ? {} : { parent: entry.parent }),
  };
}

export function toVolumeInfo(point: Point): Awaited<ReturnType<BackupProvider["volumeInfo"]>> {
  const size = Math.max(1, point.occupiedBytes);
  return { size, used: size, format: "directory", path: point.path };
}
