// SPDX-License-Identifier: AGPL-3.0-or-later
// What comparing content saves: small writes cost clusters instead of QEMU's granules, and a lost bitmap costs time only.
import { readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { LabGuest, SeededRandom, seededBytes } from "../../fixtures/lab/index.ts";
import { CleanupStack, formatBytes, GIB, MIB } from "../../src/core/index.ts";
import type { Bench } from "./bench.ts";
import { seconds } from "./contest.ts";
import { backUpGuest } from "./guest-job.ts";
import { limitRow, type Row } from "./report.ts";
import { DEVICE } from "./source-disk.ts";

const GRANULE_BYTES = 4 * MIB;
const SMALL_WRITES = 250;
const SMALL_DISK_BYTES = 64 * GIB;
const STOPPED_DATA_BYTES = 2 * GIB;
const STOPPED_CHANGED_BYTES = 64 * MIB;

export async function measureContent(bench: Bench): Promise<Row[]> {
  return [...(await measureSmallWrites(bench)), ...(await measureStoppedVm(bench))];
}

async function measureSmallWrites(bench: Bench): Promise<Row[]> {
  const compared = await incrementAfterSmallWrites(bench, 111, false);
  const whole = await incrementAfterSmallWrites(bench, 112, true);
  const measure = `${SMALL_WRITES} writes of 4 KiB on 64 GiB: stored, against whole granules`;
  const goal = { goal: 40, isGoalMinimum: true } as const;
  return [
    {
      measure,
      ours: formatBytes(compared),
      against: formatBytes(whole),
      value: whole / compared,
      unit: "times",
      ...goal,
    },
  ];
}

/** @param isForgotten the base has no digests, as those of earlier versions */
async function incrementAfterSmallWrites(bench: Bench, vmid: number, isForgotten: boolean): Promise<number> {
  await using stack = new CleanupStack();
  const { guest, storePath } = await startGuest(bench, stack, vmid, SMALL_DISK_BYTES);
  const step = SMALL_DISK_BYTES / SMALL_WRITES;
  const granules = Array.from(
    { length: SMALL_WRITES },
    (_, n) => Math.floor((n * step) / GRANULE_BYTES) * GRANULE_BYTES,
  );
  for (const [n, offset] of granules.entries()) await guest.write(DEVICE, offset, seededBytes(n + 1, GRANULE_BYTES));
  await backUpGuest(guest, storePath, "new");
  if (isForgotten) await forgetDigests(storePath, vmid);
  const random = new SeededRandom(7);
  for (const [n, offset] of granules.entries()) {
    await guest.write(DEVICE, offset + random.integer(0, 1023) * 4096, seededBytes(-n - 1, 4096));
  }
  await backUpGuest(guest, storePath, "use");
  bench.progress(`increment of ${SMALL_WRITES} small writes ${isForgotten ? "in whole granules" : "compared"}: done`);
  return await newestBytes(storePath, vmid);
}

async function measureStoppedVm(bench: Bench): Promise<Row[]> {
  await using stack = new CleanupStack();
  const { guest, storePath } = await startGuest(bench, stack, 113, 8 * GIB);
  for (let offset = 0; offset < STOPPED_DATA_BYTES; offset += GRANULE_BYTES) {
    await guest.write(DEVICE, offset, seededBytes(offset + 1, GRANULE_BYTES));
  }
  const full: number[] = [];
  const compared: number[] = [];
  let stored = 0;
  for (let run = 0; run < bench.runs; run++) {
    await rm(storePath, { recursive: true, force: true });
    await rm(`${guest.root}/etc/pve/priv`, { recursive: true, force: true });
    full.push((await backUpGuest(guest, storePath, "new")).ms);
    for (let at = 0; at < STOPPED_CHANGED_BYTES; at += MIB) {
      await guest.write(DEVICE, at * 16, seededBytes(`${run} ${at}`, MIB));
    }
    await guest.restart();
    compared.push((await backUpGuest(guest, storePath, "new")).ms);
    stored = await newestBytes(storePath, 113);
    bench.progress(
      `stopped VM: full ${full.at(-1)} ms, compared ${compared.at(-1)} ms (run ${run + 1} of ${bench.runs})`,
    );
  }
  const [fullMs, comparedMs] = [median(full), median(compared)];
  const name = "stopped VM, 2 GiB of data, 64 MiB changed";
  const size = limitRow(`${name}: stored, in MiB`, formatBytes(stored), "80 MiB", stored / (80 * MIB), 1);
  const time = limitRow(`${name}: time, against full`, seconds(comparedMs), seconds(fullMs), comparedMs / fullMs, 1.1);
  return [size, { ...time, samples: { full, compared } }];
}

async function startGuest(
  bench: Bench,
  stack: CleanupStack,
  vmid: number,
  sizeBytes: number,
): Promise<{ guest: LabGuest; storePath: string }> {
  const storePath = path.join(bench.area.diskDir, `store-${vmid}`);
  stack.defer(() => rm(storePath, { recursive: true, force: true }));
  const dir = path.join(bench.area.memoryDir, `vm-${vmid}`);
  const guest = await LabGuest.start({ dir, vmid, storeid: "bench", disks: [{ device: DEVICE, sizeBytes }] });
  return { guest: stack.use(guest), storePath };
}

/** What the newest point occupies, all of its files. */
async function newestBytes(storePath: string, vmid: number): Promise<number> {
  const folder = path.join(storePath, String(vmid));
  const newest =
    (await readdir(folder))
      .filter((name) => name.startsWith("qemu-"))
      .sort()
      .at(-1) ?? "none";
  let bytes = 0;
  for (const name of await readdir(path.join(folder, newest))) {
    bytes += (await stat(path.join(folder, newest, name))).blocks * 512;
  }
  return bytes;
}

/** Makes the backups those of a version without digests. */
async function forgetDigests(storePath: string, vmid: number): Promise<void> {
  const folder = path.join(storePath, String(vmid));
  for (const point of (await readdir(folder)).filter((name) => name.startsWith("qemu-"))) {
    const file = path.join(folder, point, "manifest.json");
    const manifest = JSON.parse(await readFile(file, "utf8")) as { files: { name: string }[] };
    const files = manifest.files.filter(({ name }) => !name.endsWith(".digests"));
    await writeFile(file, JSON.stringify({ ...manifest, files }));
  }
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
}
