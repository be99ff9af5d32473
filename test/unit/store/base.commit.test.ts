// SPDX-License-Identifier: AGPL-3.0-or-later
// What a commit asks again of the base: the copy took hours, and others use the share.
import { copyFile, readdir, readFile, rename, rm, truncate, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { BaseUnusableError, LockedError } from "../../../src/store/errors.ts";
import { backup, createLab, editJson, fillStaged, holdBase, type Lab, NEVER } from "./lab.ts";

const FULL = "100/qemu-1000";
const IMAGE = `${FULL}/drive-scsi0.qcow2`;
const MANIFEST = `${FULL}/manifest.json`;

/** What a commit says after something happened to the lower point of the base's chain; what is there afterwards. */
async function commitAfter(happens: (lab: Lab) => Promise<unknown>): Promise<{ error: unknown; names: string[] }> {
  await using lab = await createLab();
  const store = await lab.open();
  const full = await backup(store, { epoch: 1000 });
  const base = await backup(store, { epoch: 2000, base: full });
  const witness = await readFile(lab.witnessPath(100), "utf8");
  await using lock = await store.lockGuest(100, NEVER);
  await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 3000, signal: NEVER });
  const devices = await fillStaged(staged, { epoch: 3000, base });
  await using held = await holdBase(store, base);
  await happens(lab);
  const error = await staged.commit({ devices, base: held }, NEVER).then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (error !== undefined) expect(await readFile(lab.witnessPath(100), "utf8")).toBe(witness);
  const names = (await readdir(join(lab.path, "100"))).filter((name) => name.startsWith("qemu-"));
  return { error, names: names.sort() };
}

describe("Base.assertCommittable()", () => {
  it("lets a job commit whose base nobody touched, or only protected", async () => {
    for (const happens of [
      async () => undefined,
      (lab: Lab) => writeFile(join(lab.path, FULL, "attributes.json"), '{"format":"x"}'),
    ]) {
      const { error, names } = await commitAfter(happens);
      expect(error).toBeUndefined();
      expect(names).toEqual(["qemu-1000", "qemu-2000", "qemu-3000"]);
    }
  });

  it.each<[string, (lab: Lab) => Promise<unknown>, RegExp]>([
    ["was removed", (lab) => rm(join(lab.path, FULL), { recursive: true }), /qemu-1000 is missing/],
    [
      "is another backup of the same name",
      (lab) =>
        editJson(join(lab.path, MANIFEST), (manifest) => {
          manifest.uuid = "99999999-2222-3333-4444-555555555555";
        }),
      /qemu-1000 is another backup now/,
    ],
    ["lost its manifest", (lab) => rm(join(lab.path, MANIFEST)), /qemu-1000 is damaged/],
    [
      "has another manifest that says the same",
      async (lab) => {
        await copyFile(join(lab.path, MANIFEST), join(lab.path, "copy"));
        await rename(join(lab.path, "copy"), join(lab.path, MANIFEST));
      },
      /removed or replaced while it was in use/,
    ],
    ["has a shorter image", (lab) => truncate(join(lab.path, IMAGE), 65536), /qemu-1000 is damaged/],
    [
      "has another image of the same length",
      async (lab) => {
        await copyFile(join(lab.path, IMAGE), join(lab.path, "copy"));
        await rename(join(lab.path, "copy"), join(lab.path, IMAGE));
      },
      /another file took its place/,
    ],
    ["has an image that was written to", (lab) => utimes(join(lab.path, IMAGE), 1, 1), /changed while it was in use/],
  ])("stops a job whose base builds on a point that %s", async (_what, happens, reason) => {
    const { error, names } = await commitAfter(happens);
    expect(error).toBeInstanceOf(BaseUnusableError);
    expect(String(error)).toMatch(reason);
    expect(names).not.toContain("qemu-3000");
  });

  it("stops a job that lost its lock on the base", async () => {
    const { error, names } = await commitAfter(async (lab) => {
      const locks = join(lab.path, "100/.locks");
      for (const name of await readdir(locks)) await rm(join(locks, name));
    });
    expect(error).toBeInstanceOf(LockedError);
    expect(String(error)).toMatch(/its lock file is gone/);
    expect(names).not.toContain("qemu-3000");
  });
});
