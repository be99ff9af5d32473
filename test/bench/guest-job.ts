// SPDX-License-Identifier: AGPL-3.0-or-later
// Jobs of a guest of the lab: a real block layer with a real bitmap, our side in a process of its own.
import type { IncrementalMode, LabGuest } from "../../fixtures/lab/index.ts";
import { type JobRun, runJob } from "./bench.ts";
import { DEVICE } from "./source-disk.ts";
import { BenchError } from "./work-area.ts";

/** Backs up the one disk of `guest`. The access ends as after a successful job, if `finish` is not false. */
export async function backUpGuest(
  guest: LabGuest,
  storePath: string,
  mode: IncrementalMode,
  options: { readonly finish?: boolean } = {},
): Promise<JobRun> {
  const access = await guest.openBackup({ modes: { [DEVICE]: mode } });
  const volume = access.vmVolumes().get(DEVICE);
  const nbdPath = volume?.nbdPath;
  if (volume === undefined || nbdPath === undefined) throw new BenchError(`The guest has no ${DEVICE}`);
  const job = await runJob({
    storePath,
    root: guest.root,
    compression: "none",
    mode: "incremental",
    vmid: guest.vmid,
    device: DEVICE,
    sizeBytes: volume.size,
    nbdPath,
    bitmapMode: volume.bitmapMode,
    bitmapName: volume.bitmapName,
    guestConfig: guest.guestConfig,
  });
  if (mode === "use" && volume.bitmapMode !== "reuse") throw new BenchError("The guest has no bitmap to reuse");
  if (options.finish !== false) await access.finish(true);
  return job;
}
