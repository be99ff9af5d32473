// SPDX-License-Identifier: AGPL-3.0-or-later
// Points of the store in the words of PVE's storage listing.

import type { VolumeEntry, VolumeInfo } from "../provider/index.ts";
import { volnameOf } from "../pve/index.ts";
import type { Point, PointEntry } from "../store/index.ts";

const FORMAT = "directory";

export function toVolumeEntry(entry: PointEntry): VolumeEntry {
  return {
    volname: entry.volname,
    vmid: entry.vmid,
    subtype: entry.type,
    ctime: entry.epoch,
    size: Math.max(1, entry.occupiedBytes),
    format: FORMAT,
    protected: entry.protected,
    ...(entry.notes === undefined ? {} : { notes: entry.notes }),
    ...(entry.parent === undefined ? {} : { parent: entry.parent }),
  };
}

export function toVolumeInfo(point: Point): VolumeInfo {
  const size = Math.max(1, point.occupiedBytes);
  const base = [...point.devices.values()].find((device) => device.base !== undefined)?.base;
  return {
    ...{ size, used: size, format: FORMAT },
    ...(base === undefined ? {} : { parent: volnameOf(`${point.vmid}/${base.folder}`) }),
  };
}
