// SPDX-License-Identifier: AGPL-3.0-or-later
// Stores on file systems that are read-only or full. Needs root for the mounts.
import { execFileSync } from "node:child_process";
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it, type TestContext } from "vitest";
import { errnoOf } from "../../../src/core/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { backup, createLab, decide, holdChains, type Lab, NEVER } from "./lab.ts";

/** Mounts over the store until disposed; skips the test where mounting is not allowed. */
function mountStore(context: TestContext, lab: Lab, ...args: string[]): Disposable {
  requireTool(context, "mount", "umount");
  try {
    execFileSync("mount", [...args, lab.path], { stdio: "pipe" });
  } catch (error) {
    if (process.env.REQUIRE_TOOLS === "1") throw error;
    context.skip("needs to mount, which is not allowed here");
  }
  return { [Symbol.dispose]: () => void execFileSync("umount", ["--lazy", lab.path]) };
}

describe("a store mounted read-only", () => {
  it("can be listed and read, and refuses backups in one clear sentence", async (context) => {
    await using lab = await createLab();
    const writable = await lab.open();
    const base = await backup(writable, { epoch: 1000 });
    await backup(writable, { epoch: 2000, base });
    using _mount = mountStore(context, lab, "--bind", lab.path);
    execFileSync("mount", ["-o", "remount,ro,bind", lab.path]);
    const store = await lab.open();
    expect(await store.listPoints({}, NEVER)).toHaveLength(2);
    const point = await store.openPoint("100/qemu-2000", NEVER);
    await using _readers = await holdChains(store, point, NEVER);
    expect(lab.warnings).toEqual([expect.stringMatching(/^Reading "backup\/100\/qemu-2000" without a lock: .*EROFS/)]);
    await expect(holdChains(store, point, NEVER, "required")).rejects.toThrow(/EROFS/);
    expect((await point.guestConfig()).length).toBeGreaterThan(0);
    await expect(store.lockGuest(100, NEVER)).rejects.toThrow(/the file system is read-only \(EROFS\)/);
    await expect(store.updateAttributes("100/qemu-2000", { notes: "n" }, NEVER)).rejects.toThrow(/EROFS/);
  });
});

/** Leaves not a byte free. */
async function fillUp(lab: Lab): Promise<void> {
  await expect(writeFile(join(lab.path, "filler"), Buffer.alloc(3 * 1024 * 1024, 1))).rejects.toThrow(/ENOSPC/);
}

describe("a store that is full", () => {
  it("can be restored from, without a lock, unless the lock is required", async (context) => {
    await using lab = await createLab();
    using _mount = mountStore(context, lab, "-t", "tmpfs", "-o", "size=2m", "tmpfs");
    const store = await lab.open();
    const base = await backup(store, { epoch: 1000 });
    const point = await backup(store, { epoch: 2000, base });
    await fillUp(lab);
    await using _readers = await holdChains(store, point, NEVER);
    expect(lab.warnings).toEqual([expect.stringMatching(/^Reading "backup\/100\/qemu-2000" without a lock: .*ENOSPC/)]);
    await expect(holdChains(store, point, NEVER, "required")).rejects.toThrow(/ENOSPC/);
  });

  it("does not let anybody read what is being removed", async (context) => {
    await using lab = await createLab();
    using _mount = mountStore(context, lab, "-t", "tmpfs", "-o", "size=2m", "tmpfs");
    const store = await lab.open();
    const base = await backup(store, { epoch: 1000 });
    const point = await backup(store, { epoch: 2000, base });
    await using _remover = await store.lockPointExclusive(base, NEVER);
    await fillUp(lab);
    await expect(holdChains(store, point, NEVER)).rejects.toThrow(/it is being removed by process/);
  });

  it("fails the backup in one clear sentence and leaves the last one as the base", async (context) => {
    await using lab = await createLab();
    using _mount = mountStore(context, lab, "-t", "tmpfs", "-o", "size=2m", "tmpfs");
    const store = await lab.open();
    await backup(store, { epoch: 1000 });
    const witness = await readFile(lab.witnessPath(100));
    await using lock = await store.lockGuest(100, NEVER);
    {
      await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 2000, signal: NEVER });
      await using filler = await staged.newFile("filler.bin").create();
      await expect(filler.writeFile(Buffer.alloc(3 * 1024 * 1024, 1))).rejects.toThrow(/ENOSPC/);
      const error = await staged.writeFile("guest.conf", Buffer.alloc(65536, 65)).catch((thrown: unknown) => thrown);
      expect(String(error)).toMatch(/Cannot write ".*guest\.conf": no space left on the device \(ENOSPC\)$/);
      expect(errnoOf(error)).toBe("ENOSPC");
      await staged.newFile("guest.conf").remove();
      await expect(staged.commit({ devices: [] }, NEVER)).rejects.toThrow(/guest\.conf/);
    }
    expect(await readFile(lab.witnessPath(100))).toEqual(witness);
    expect((await readdir(join(lab.path, "100"))).sort()).toEqual([".lock", "qemu-1000", "state.json"]);
    expect(await decide(store)).toBe("use 100/qemu-1000");
  });
});
