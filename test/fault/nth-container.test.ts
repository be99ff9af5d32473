// SPDX-License-Identifier: AGPL-3.0-or-later
// One whole backup of a container, as the process of root that owns the store sees it: each of its operations on the
// store and on the folder of its socket fails. The test plays the archiver; what that one writes to a full disk is in
// full-store.test.ts.
// biome-ignore assist/source/organizeImports: it must come before the product
import { errnosFor, type Fault, type Step, stepsOf } from "../support/fault/fault-fs.ts";
import { describe, expect, it, onTestFailed } from "vitest";
import { ContainerSite } from "../support/fault/fault-container.ts";
import { age, endOwners } from "../support/fault/fault-folder.ts";
import { isFull, MATRIX_TIMEOUT_MS } from "../support/fault/full-matrix.ts";
import { requireTool } from "../support/programs/tools.ts";

/** What is done and fails all the same is a case of its own where the product looks whether it was done. */
const isOdd = ({ kind }: Step, flavour: Fault["flavour"]): boolean =>
  flavour === "after" && (kind === "link" || kind === "rename");

/** What could not be removed waits for the next backup; everything else is gone at once. */
const mayStay = ({ kind }: Step): boolean => kind === "unlink" || kind === "rmdir";

describe.each(["tar", "squashfs"] as const)("a container's backup as %s", (mode) => {
  it.for<[Fault["flavour"], number]>([
    ["before", 1],
    ["after", 2],
    ["onwards", 3],
    ["short", 1],
  ])(
    "is whole or not there when its Nth operation fails (%s)",
    { timeout: MATRIX_TIMEOUT_MS },
    async (how, context) => {
      requireTool(context, "tar", "mksquashfs");
      const flavour = how[0];
      const every = mode === "tar" || flavour === "before" ? how[1] : 2 * how[1]; // the store does the same for both
      await using site = await ContainerSite.create(mode);
      const clean = await site.vzdump();
      expect(clean.message).toBeUndefined();
      const steps = stepsOf(clean.operations).filter(({ kind }) => kind === "write" || flavour !== "short");
      expect(steps.length).toBeGreaterThan(flavour === "short" ? 7 : 50);
      let cell = "";
      onTestFailed(() => console.info(cell, site.log));
      for (const at of steps.filter((step, index) => isFull || isOdd(step, flavour) || index % every === 0)) {
        for (const errno of errnosFor(at.kind)) {
          cell = `${flavour} ${errno}: ${at.occurrence}. ${at.name}`;
          const outcome = await site.vzdump({ at, errno, flavour });
          expect(outcome.fired).toBeDefined();
          const left = await site.expectWhole(outcome);
          // A lock that was taken and a backup that became visible are looked for: a lost reply does not matter.
          if (flavour === "after" && /^link|^rename .*lxc-\*$/.test(at.name)) expect(outcome.message).toBeUndefined();
          if (flavour === "before" && !mayStay(at)) expect(left).toEqual([]);
          if (left.length === 0) continue;
          await age(left);
          await endOwners(site.runDir);
          const next = await site.vzdump();
          expect(next.message).toBeUndefined();
          expect(await site.expectWhole(next)).toEqual([]);
        }
      }
      const last = await site.vzdump();
      expect([last.message, last.isCommitted]).toEqual([undefined, true]);
      await site.expectWhole(last);
    },
  );
});
