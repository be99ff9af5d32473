// SPDX-License-Identifier: AGPL-3.0-or-later
import { readdir, readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { LockedError } from "../../../../src/store/errors.ts";
import type { Store } from "../../../../src/store/index.ts";
import { LOCK_TIMING } from "../../../../src/store/lock/lock-record.ts";
import { backup, createLab, holdChains, type Lab, NEVER } from "../lab.ts";

/** Four points that build on each other, and one beside them. */
async function makeChain(store: Store) {
  const full = await backup(store, { epoch: 1000 });
  const middle = await backup(store, { epoch: 2000, base: full });
  const top = await backup(store, { epoch: 3000, base: middle });
  const child = await backup(store, { epoch: 4000, base: top });
  const alone = await backup(store, { epoch: 5000 });
  return { full, middle, top, child, alone };
}

const locksOf = (lab: Lab): string => join(lab.path, "100/.locks");

/** The only readers' lock of guest 100. */
async function readersLock(lab: Lab): Promise<{ path: string; text: string; record: Record<string, unknown> }> {
  const [name, ...others] = (await readdir(locksOf(lab))).filter((one) => one.includes(".shared-"));
  expect(others).toEqual([]);
  const path = join(locksOf(lab), name ?? "no lock");
  const text = await readFile(path, "utf8");
  return { path, text, record: JSON.parse(text) as Record<string, unknown> };
}

describe("lockPointExclusive()", () => {
  it("finds a reader of any point of a chain by one file, which names them all", async () => {
    await using lab = await createLab();
    const store = await lab.open({ timing: LOCK_TIMING }); // nothing here is old enough to be broken
    const { full, middle, top, child, alone } = await makeChain(store);
    await using _reader = await holdChains(store, top);
    const { path, text, record } = await readersLock(lab);
    expect(path).toMatch(/\/qemu-3000\.shared-[0-9a-f-]{36}$/);
    expect(record.points).toEqual(["qemu-1000", "qemu-2000", "qemu-3000"]);
    expect(text).toHaveLength(1024);
    for (const point of [full, middle, top]) {
      await expect(store.lockPointExclusive(point, NEVER)).rejects.toThrow(
        `Cannot lock "${point.volname}": it is being read by process ${process.pid} on `,
      );
    }
    for (const point of [child, alone]) {
      await using _free = await store.lockPointExclusive(point, NEVER);
    }
  });

  it("respects a lock without a list of points on the point of its name, and on no other", async () => {
    await using lab = await createLab();
    const store = await lab.open({ timing: LOCK_TIMING });
    const { full, middle, top } = await makeChain(store);
    await using _reader = await holdChains(store, top);
    const { path, record } = await readersLock(lab);
    const { points: _points, ...older } = record;
    await writeFile(path, JSON.stringify(older));
    await rename(path, path.replace("qemu-3000", "qemu-2000"));
    await expect(store.lockPointExclusive(middle, NEVER)).rejects.toThrow(LockedError);
    for (const point of [full, top]) {
      await using _free = await store.lockPointExclusive(point, NEVER);
    }
  });

  it.each([
    ["is empty", () => ""],
    ["is cut off", (text: string) => text.slice(0, 200)],
    ["lists something else than points", (text: string) => text.replace(/"points":\[[^\]]*\]/, '"points":{}')],
  ])("takes a readers' lock that %s for one on every point of the guest", async (_what, change) => {
    await using lab = await createLab();
    const store = await lab.open({ timing: LOCK_TIMING });
    const { top, alone } = await makeChain(store);
    await using _reader = await holdChains(store, top);
    const { path, text } = await readersLock(lab);
    const changed = change(text);
    expect(changed).not.toBe(text);
    await writeFile(path, changed);
    await expect(store.lockPointExclusive(alone, NEVER)).rejects.toThrow(/qemu-5000": it is being read by /);
  });
});
