// SPDX-License-Identifier: AGPL-3.0-or-later
// A folder that cannot be removed.
import { mkdir, mkdtemp, readdir, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { expect, it, vi } from "vitest";
import { sweepRawViews } from "../../../src/device/index.ts";

const stubborn = vi.hoisted(() => ({ path: "" }));
vi.mock("node:fs/promises", async (original) => {
  const real = await original<typeof import("node:fs/promises")>();
  return {
    ...real,
    rm: async (...args: Parameters<typeof real.rm>) => {
      if (args[0] !== stubborn.path) return await real.rm(...args);
      throw Object.assign(new Error("EBUSY: busy"), { code: "EBUSY", syscall: "rmdir" });
    },
  };
});

it("sweepRawViews() warns of a folder that stays, and removes the others", async () => {
  const runDir = await mkdtemp(path.join(os.tmpdir(), "raw-view-stubborn-"));
  const [first, second, third] = ["restore-999999997-0", "restore-999999998-0", "restore-999999999-0"];
  for (const name of [first, second, third]) await mkdir(path.join(runDir, name as string));
  stubborn.path = path.join(runDir, second as string);
  const warnings: string[] = [];
  await sweepRawViews(runDir, (message) => void warnings.push(message));
  expect(await readdir(runDir)).toEqual([second]);
  expect(warnings).toEqual([`Cannot remove "${stubborn.path}": failed (EBUSY)`]);
  stubborn.path = "";
  await rm(runDir, { recursive: true });
});
