// SPDX-License-Identifier: AGPL-3.0-or-later
// Restores, listings, notes and the check of a VM's backups while a writer of the share swaps one name before one call.
import { hostname } from "node:os";
import { afterEach, describe, expect, it, vi } from "vitest";
import { check } from "../../../src/cli/check.ts";
import { Store } from "../../../src/store/index.ts";
import { MATRIX_TIMEOUT_MS } from "../../support/fault/full-matrix.ts";
import { attributes, listAll, playAttacks, vmRestore, withTwoPoints } from "../../support/share/share-jobs.ts";
import { type Job, NEVER, ShareSite } from "../../support/share/share-site.ts";

const timeout = MATRIX_TIMEOUT_MS;
afterEach(() => void vi.restoreAllMocks());

/** What the command line does and prints. */
function checkBy(site: ShareSite): Job {
  return async () => {
    const printed: string[] = [];
    vi.spyOn(console, "log").mockImplementation((line) => void printed.push(String(line)));
    const warn = (line: string): void => void site.log.push(`warn: ${line}`);
    const store = await Store.open({
      path: site.storePath,
      storeid: "cli",
      root: site.root,
      nodename: hostname(),
      warn,
    });
    try {
      await check(store, "100/qemu-2000", NEVER);
    } finally {
      await (store as Partial<AsyncDisposable>)[Symbol.asyncDispose]?.();
      vi.restoreAllMocks();
    }
    return printed;
  };
}

describe("what is read of a share that others write to", () => {
  it("is nothing but the store in a restore", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await playAttacks(site, vmRestore("backup/100/qemu-2000"), { every: 3, restoreEvery: 10 });
  });

  it("is nothing but the store in a listing", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await playAttacks(site, listAll, { restoreEvery: 12 });
  });

  it("and written is nothing but the store where notes and protection change", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await playAttacks(site, attributes("backup/100/qemu-2000"), { every: 2, restoreEvery: 10 });
  });

  it("is nothing but the store by the command line's check", { timeout }, async (context) => {
    await using site = await ShareSite.start(context, withTwoPoints);
    await playAttacks(site, checkBy(site), { every: 2, restoreEvery: 12 });
    expect(vi.isMockFunction(console.log)).toBe(false);
  });
});
