// SPDX-License-Identifier: AGPL-3.0-or-later
// Servers that hang, where the kernel cannot be told at once. The rest of FuseCalls: test/unit/provider/fuse-file.
import { rename } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { runTool } from "../../../fixtures/lab/index.ts";
import { FuseCalls } from "../../../src/device/index.ts";
import { listMounts } from "../../../src/device/mounts.ts";
import { FuseDisk, requireFuseTools } from "../../support/vm/fuse-disk.ts";

const never = new AbortController().signal;
const BYTES = 65_536;
const SILENCE_MS = 1_000;
/** The server answers after 60 s. */
const SOON_MS = 20_000;

const startSlowDisk = () => FuseDisk.start(Buffer.alloc(BYTES), "delay", "rdelay=60");

/** A read that ends with the connection. @returns how long it took, in ms */
async function readUntilAborted(disk: FuseDisk, calls: FuseCalls): Promise<number> {
  const startMs = performance.now();
  const reading = calls.run(() => disk.handle.read(Buffer.alloc(4096), 0, 4096, 0), never);
  await expect(reading).rejects.toThrow(/ENOTCONN|ECONNABORTED|ENODEV|EIO/);
  return performance.now() - startMs;
}

describe("FuseCalls.run()", () => {
  it("tries again when the mount was not where it is known to be", async (context) => {
    requireFuseTools(context);
    await using disk = await startSlowDisk();
    const calls = await FuseCalls.on(disk.path, SILENCE_MS);
    const elsewhere = `${disk.dir}.elsewhere`;
    await rename(disk.dir, elsewhere);
    const reading = readUntilAborted(disk, calls);
    await sleep(2 * SILENCE_MS);
    expect(calls.silentForMs).toBe(SILENCE_MS); // it has tried
    await rename(elsewhere, disk.dir);
    expect(await reading).toBeLessThan(SOON_MS);
  });

  it("tries again when something else was mounted in its place", async (context) => {
    requireFuseTools(context);
    await using disk = await startSlowDisk();
    const calls = await FuseCalls.on(disk.path, SILENCE_MS);
    const point = path.dirname(disk.path);
    await runTool("mount", ["-t", "tmpfs", "none", point]);
    expect(await readUntilAborted(disk, calls)).toBeLessThan(SOON_MS);
    // The kernel keeps what has an open file.
    expect((await listMounts()).filter((mount) => mount.point === point)).toMatchObject([{ point, type: "fuse" }]);
  });
});
