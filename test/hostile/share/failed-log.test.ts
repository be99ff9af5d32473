// SPDX-License-Identifier: AGPL-3.0-or-later
// What backup_init and a failed job do in a guest's folder, with leftovers of all kinds in it: the sweep, and the log
// that is kept.
import { execFileSync } from "node:child_process";
import { mkdirSync, utimesSync, writeFileSync } from "node:fs";
import path from "node:path";
import { describe, it } from "vitest";
import { MATRIX_TIMEOUT_MS } from "../../support/fault/full-matrix.ts";
import { failedJob, playAttacks, withTwoPoints } from "../../support/share/share-jobs.ts";
import { ShareSite, VM } from "../../support/share/share-site.ts";

const timeout = MATRIX_TIMEOUT_MS;
const OLD = new Date(Date.now() - 40 * 24 * 60 * 60 * 1000);

/** What dead jobs leave: staging folders, temporary files, readers' locks; and logs that are too old. */
async function withLeftovers(site: ShareSite): Promise<void> {
  await withTwoPoints(site);
  const guest = path.join(site.storePath, String(VM));
  const files = [".staging-1/guest.conf", ".staging-1/sub/deep", ".trash-1/guest.conf", ".tmp-1", "qemu-1000/.tmp-2"];
  for (const name of [...files, ".locks/old-reader", ".locks/.tmp-3", "failed/qemu-500.log", "failed/.tmp-4"]) {
    const file = path.join(guest, name);
    mkdirSync(path.dirname(file), { recursive: true });
    writeFileSync(file, name);
    utimesSync(file, OLD, OLD);
  }
  for (const name of [".staging-1", ".trash-1"]) execFileSync("touch", ["-d", "2001-01-01", path.join(guest, name)]);
}

describe("a job that sweeps a share that others write to", () => {
  it("removes and writes nothing outside of the store", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withLeftovers);
    await playAttacks(site, failedJob(site, 3000), { every: 2, restoreEvery: 12 });
  });
});
