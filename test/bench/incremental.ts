// SPDX-License-Identifier: AGPL-3.0-or-later
// An incremental backup must cost what has changed, not what the disk is.
import { rm } from "node:fs/promises";
import path from "node:path";
import { LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { CleanupStack, formatBytes, GIB, MIB } from "../../src/core/index.ts";
import type { Bench } from "./bench.ts";
import { type Contestant, compete, medianOf, seconds } from "./contest.ts";
import { backUpGuest } from "./guest-job.ts";
import { limitRow, type Row } from "./report.ts";
import { DEVICE } from "./source-disk.ts";

const SMALL_BYTES = 16 * GIB;
const LARGE_BYTES = 256 * GIB;
const DIRTY_BYTES = 64 * MIB;
/** QEMU's granularity for backup providers: the guest dirties whole granules, spread over the disk. */
const GRANULE_BYTES = 4 * MIB;
/** These runs are short, and the ratio is near 1: more of them. */
const MIN_RUNS = 7;

export async function measureIncremental(bench: Bench): Promise<Row[]> {
  await using stack = new CleanupStack();
  const small = await diskOf(bench, stack, SMALL_BYTES, 101);
  const large = await diskOf(bench, stack, LARGE_BYTES, 102);
  const times = await compete([small, large], Math.max(MIN_RUNS, bench.runs), bench.progress);
  const [smallMs, largeMs] = [medianOf(times, small.name), medianOf(times, large.name)];
  const name = "incremental, 64 MiB dirty: 256 GiB disk against 16 GiB";
  const row = limitRow(name, seconds(largeMs), seconds(smallMs), largeMs / smallMs, 1.2);
  return [{ ...row, samples: Object.fromEntries(times) }];
}

/** A guest with a full backup, whose runs are incremental ones. */
async function diskOf(bench: Bench, stack: CleanupStack, sizeBytes: number, vmid: number): Promise<Contestant> {
  const storePath = path.join(bench.area.diskDir, `store-${vmid}`);
  stack.defer(() => rm(storePath, { recursive: true, force: true }));
  const guest = stack.use(
    await LabGuest.start({
      dir: path.join(bench.area.memoryDir, `vm-${vmid}`),
      vmid,
      storeid: "bench",
      disks: [{ device: DEVICE, sizeBytes }],
    }),
  );
  await dirty(guest, sizeBytes, 0);
  await backUpGuest(guest, storePath, "new");
  let round = 0;
  return {
    name: `incremental of ${formatBytes(DIRTY_BYTES)} on a disk of ${formatBytes(sizeBytes)}`,
    remove: async () => undefined,
    async run() {
      await dirty(guest, sizeBytes, ++round);
      return (await backUpGuest(guest, storePath, "use")).ms;
    },
  };
}

async function dirty(guest: LabGuest, sizeBytes: number, round: number): Promise<void> {
  const granules = DIRTY_BYTES / GRANULE_BYTES;
  for (let index = 0; index < granules; index++) {
    const bytes = seededBytes(round * granules + index + 1, GRANULE_BYTES);
    await guest.write(DEVICE, (sizeBytes / granules) * index, bytes);
  }
}
