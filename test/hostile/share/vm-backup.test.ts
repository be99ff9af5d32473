// SPDX-License-Identifier: AGPL-3.0-or-later
// Backups of a VM while a writer of the share swaps one name before one call of the product, for every call.
import { describe, it } from "vitest";
import { MATRIX_TIMEOUT_MS } from "../../support/fault/full-matrix.ts";
import { playAttacks, vmBackup, withTwoPoints } from "../../support/share/share-jobs.ts";
import { ShareSite } from "../../support/share/share-site.ts";

const timeout = MATRIX_TIMEOUT_MS;

describe("a VM's backup on a share that others write to", () => {
  it("reaches nothing outside of the store when it is a full one", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await playAttacks(site, vmBackup(site, 3000), { every: 3, restoreEvery: 6 });
  });

  it("reaches nothing outside of the store when it is incremental", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await playAttacks(site, vmBackup(site, 3000, "incremental"), { every: 4, restoreEvery: 6 });
  });
});
