// SPDX-License-Identifier: AGPL-3.0-or-later
import { mkdir, readdir, readFile, stat, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { RequestError } from "../../../src/core/index.ts";
import type { Store } from "../../../src/store/index.ts";
import { backup, createLab, type Lab, NEVER } from "./lab.ts";

let lab: Lab;
let store: Store;
beforeEach(async () => {
  lab = await createLab();
  store = await lab.open();
});
afterEach(async () => await lab[Symbol.asyncDispose]());

describe("Store.updateAttributes()", () => {
  it("changes one attribute and keeps the others, and never the manifest", async () => {
    const point = await backup(store, { epoch: 1000 });
    const manifest = await readFile(join(point.path, "manifest.json"));
    await store.updateAttributes(point.archive, { notes: "n" }, NEVER);
    await store.updateAttributes(point.archive, { protected: true }, NEVER);
    expect(await store.readAttributes(point.archive, NEVER)).toEqual({ notes: "n", protected: true });
    await store.updateAttributes(point.archive, { notes: "" }, NEVER);
    expect(await store.readAttributes(point.archive, NEVER)).toEqual({ protected: true });
    expect(await readFile(join(point.path, "manifest.json"))).toEqual(manifest);
    expect((await stat(join(point.path, "attributes.json"))).mode & 0o777).toBe(0o600);
  });

  it("loses no change when many come at once", async () => {
    const { archive } = await backup(store, { epoch: 1000 });
    const other = await lab.open();
    await Promise.all([
      store.updateAttributes(archive, { protected: true }, NEVER),
      other.updateAttributes(archive, { notes: "kept" }, NEVER),
      store.updateAttributes(archive, { verify: { state: "ok", at: "2025-01-01T00:00:00Z" } }, NEVER),
    ]);
    expect(await store.readAttributes(archive, NEVER)).toEqual({
      notes: "kept",
      protected: true,
      verify: { state: "ok", at: "2025-01-01T00:00:00Z" },
    });
  });

  it("works while a backup of the same guest runs", async () => {
    const { archive } = await backup(store, { epoch: 1000 });
    await using _lock = await store.lockGuest(100, NEVER);
    await store.updateAttributes(archive, { protected: true }, NEVER);
    expect((await store.readAttributes(archive, NEVER)).protected).toBe(true);
  });

  it("takes a file it does not understand for protection", async () => {
    const point = await backup(store, { epoch: 1000 });
    await writeFile(join(point.path, "attributes.json"), "{");
    expect(await store.readAttributes(point.archive, NEVER)).toEqual({ protected: true });
    expect(lab.warnings.join()).toMatch(/it counts as protected/);
  });

  it("refuses notes that are too long", async () => {
    const { archive } = await backup(store, { epoch: 1000 });
    await expect(store.updateAttributes(archive, { notes: "x".repeat(131_073) }, NEVER)).rejects.toThrow(RequestError);
  });
});

describe("task logs", () => {
  it("lie beside the point and do not damage it", async () => {
    const point = await backup(store, { epoch: 1000 });
    const log = join(lab.root, "task.log");
    await writeFile(log, "INFO: done\n");
    await store.storeLog(point, log);
    expect(await readFile(join(point.path, "backup.log"), "utf8")).toBe("INFO: done\n");
    expect(await store.listPoints({}, NEVER)).toHaveLength(1);
  });

  it("keep beginning and end when they are too long", async () => {
    const point = await backup(store, { epoch: 1000 });
    const log = join(lab.root, "task.log");
    await writeFile(log, `FIRST${"x".repeat(6 * 1024 * 1024)}LAST`);
    await store.storeLog(point, log);
    const kept = await readFile(join(point.path, "backup.log"), "latin1");
    expect(kept.length).toBe(4 * 1024 * 1024);
    expect(kept.startsWith("FIRSTx")).toBe(true);
    expect(kept.endsWith("xLAST")).toBe(true);
    expect(kept).toContain("[... cut: the log was too long ...]");
  });

  it("of failed jobs are kept, the newest 20 of them, for 30 days", async () => {
    const log = join(lab.root, "task.log");
    await writeFile(log, "ERROR: failed\n");
    const failed = join(lab.path, "100/failed");
    await mkdir(failed, { recursive: true });
    await writeFile(join(failed, "of-the-admin.txt"), "");
    for (let n = 1; n <= 22; n++) {
      await store.keepFailedLog({ vmid: 100, type: "qemu", epoch: n }, log);
      const seconds = Date.now() / 1000 - 1000 + n;
      await utimes(join(failed, `qemu-${n}.log`), seconds, seconds);
    }
    const names = await readdir(failed);
    expect(names).toHaveLength(21);
    expect(names).toContain("qemu-22.log");
    expect(names).not.toContain("qemu-1.log");
    const longAgo = Date.now() / 1000 - 31 * 24 * 3600;
    for (let n = 3; n <= 22; n++) await utimes(join(failed, `qemu-${n}.log`), longAgo, longAgo);
    await backup(store, { epoch: 1000 });
    expect(await readdir(failed)).toEqual(["of-the-admin.txt"]);
  });

  it("refuse what is no regular file", async () => {
    await expect(store.keepFailedLog({ vmid: 100, type: "qemu", epoch: 1 }, "/dev/zero")).rejects.toThrow(
      /it is a device, not a file/,
    );
  });
});
