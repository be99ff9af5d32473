// SPDX-License-Identifier: AGPL-3.0-or-later
// Backups and restores of a container while a writer of the share swaps one name before one call of the product. The
// container's root is not at work here: see test/unit/provider/container-backup.test.ts for him.
import { describe, it } from "vitest";
import { MATRIX_TIMEOUT_MS } from "../../support/fault/full-matrix.ts";
import { containerBackup, containerRestore, playAttacks } from "../../support/share/share-jobs.ts";
import { ShareSite } from "../../support/share/share-site.ts";

const timeout = MATRIX_TIMEOUT_MS;

async function withOnePoint(site: ShareSite): Promise<void> {
  await using provider = site.provider();
  await containerBackup(site, 1000)(provider);
}

describe("a container on a share that others write to", () => {
  it("is backed up without reaching anything outside of the store", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withOnePoint);
    await playAttacks(site, containerBackup(site, 2000), { every: 3, restoreEvery: 4 });
  });

  it("is restored from the store alone", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withOnePoint);
    await playAttacks(site, containerRestore("backup/101/lxc-1000"), { every: 2, restoreEvery: 4 });
  });
});
