// SPDX-License-Identifier: AGPL-3.0-or-later
// System calls that fail now and then: nothing may be left out for it, and whoever asked hears why.
import { existsSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { EnvironmentError, HostError } from "../../../src/core/index.ts";
import { PointDamagedError, type Store } from "../../../src/store/index.ts";
import {
  backup,
  createLab,
  decide,
  fillStaged,
  type Lab,
  legacyImageBytes,
  MIB,
  makeLegacy,
  NEVER,
  resolveChain,
} from "./lab.ts";

/** The call that fails: its name, the end of its path (also where it goes through a descriptor), with which errno, and after how many that do not. */
const fault = vi.hoisted(() => ({ call: "", path: "", errno: "EIO", skip: 0 }));
vi.mock("node:fs/promises", async (original) => {
  const { realPathOf } = await import("../../support/fault/proc-path.ts");
  const real = await original<Record<string, unknown>>();
  const wrap =
    (name: string, call: (...args: unknown[]) => unknown) =>
    async (...args: unknown[]): Promise<unknown> => {
      if (name === fault.call && realPathOf(String(args[0])).endsWith(fault.path) && fault.skip-- <= 0) {
        throw Object.assign(new Error(`${fault.errno}: injected`), { code: fault.errno, syscall: name });
      }
      return await call(...args);
    };
  return Object.fromEntries(
    Object.entries(real).map(([name, value]) => [
      name,
      ["lstat", "stat", "open", "readdir"].includes(name) ? wrap(name, value as () => unknown) : value,
    ]),
  );
});

function failOn(call: string, path: string, errno = "EIO", skip = 0): void {
  Object.assign(fault, { call, path, errno, skip });
}

let lab: Lab;
let store: Store;
beforeEach(async () => {
  lab = await createLab();
  store = await lab.open();
});
afterEach(async () => {
  failOn("", "");
  await lab[Symbol.asyncDispose]();
});

const thrownBy = async (work: Promise<unknown>): Promise<unknown> =>
  await work.then(
    () => undefined,
    (error: unknown) => error,
  );

describe("StagedPoint.commit()", () => {
  it.each([
    ["lstat", "guest.conf", "EIO", 0],
    ["lstat", "firewall.conf", "EIO", 1], // when its size on the disk is added up
    ["open", "firewall.conf", "EIO", 0],
    ["open", "guest.conf", "EACCES", 0],
    ["readdir", "", "EIO", 0],
    ["stat", "etc/pve/priv", "ENOTCONN", 0], // the cluster file system is down
  ])("says so and makes no point when %s of %j fails with %s after %i calls", async (call, path, errno, skip) => {
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 1000 });
    await staged.writeFile("firewall.conf", Buffer.from("[OPTIONS]\n"));
    failOn(call, path === "" ? staged.folder.path : path, errno, skip);
    const error = await thrownBy(staged.commit({ devices }, NEVER));
    expect(error).toBeInstanceOf(EnvironmentError);
    expect(String(error)).toContain(`(${errno})`);
    failOn("", "");
    expect(await store.listPoints({}, NEVER)).toEqual([]);
    expect(existsSync(join(lab.root, "var/lib/pve-backup-host"))).toBe(false);
  });

  it("says so and makes no point when a file vanishes between the list and the look", async () => {
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 1000 });
    failOn("lstat", "guest.conf", "ENOENT");
    expect(String(await thrownBy(staged.commit({ devices }, NEVER)))).toMatch(/its file guest\.conf has vanished$/);
    failOn("", "");
    expect(await store.listPoints({}, NEVER)).toEqual([]);
  });

  it("refuses a config that is larger than any", async () => {
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1000, signal: NEVER });
    const devices = await fillStaged(staged, { epoch: 1000 });
    for (let at = 0; at <= 5000; at += 500) {
      await Promise.all(Array.from({ length: 500 }, (_, n) => writeFile(staged.pathOf(`file-${at + n}`), "")));
    }
    expect(await thrownBy(staged.commit({ devices }, NEVER))).toBeInstanceOf(PointDamagedError);
  });
});

describe("a store whose disk fails now and then", () => {
  it("does not call a file missing that it could not look at", async () => {
    await backup(store, { epoch: 1000 });
    failOn("lstat", "guest.conf");
    expect(await store.listPoints({}, NEVER)).toEqual([]);
    expect(lab.warnings[0]).toMatch(/qemu-1000": Cannot read ".*": input\/output error \(EIO\)$/);
  });

  it.each([
    ["open", "state.json", (): Promise<unknown> => backup(store, { epoch: 2000 })],
    ["lstat", ".lock", (): Promise<unknown> => backup(store, { epoch: 2000 })],
    [
      "readdir",
      ".locks",
      async (): Promise<unknown> => store.lockPointExclusive(await store.openPoint("100/qemu-1000", NEVER), NEVER),
    ],
    [
      "lstat",
      "failed/qemu-2000.log",
      async (): Promise<unknown> => {
        await writeFile(join(lab.root, "log"), "");
        return await store.keepFailedLog({ vmid: 100, type: "qemu", epoch: 2000 }, join(lab.root, "log"));
      },
    ],
  ])("words it when %s of %s fails", async (call, path, work) => {
    await backup(store, { epoch: 1000 });
    failOn(call, path);
    const error = await thrownBy(work());
    expect(error).toBeInstanceOf(HostError);
    expect(String(error)).toMatch(/^EnvironmentError: Cannot .* input\/output error \(EIO\)$/);
  });

  it("makes a full backup where the witness's place cannot be looked at, and never asks the local one", async () => {
    await backup(store, { epoch: 1000 });
    expect(await decide(store)).toBe("use 100/qemu-1000");
    failOn("stat", "etc/pve/priv", "ENOTCONN");
    expect(await decide(store)).toMatch(/^the record of the last backup is damaged: Cannot look at ".*ENOTCONN/);
  });

  it("does not call the folder of a legacy base missing that it could not look at", async () => {
    await makeLegacy(lab, "qemu-100", { "drive-scsi0": legacyImageBytes(8 * MIB) });
    const point = await store.openPoint("100/qemu-100", NEVER);
    failOn("open", "qemu-100");
    const error = await thrownBy(resolveChain(store, point, "drive-scsi0", NEVER));
    expect(error).toBeInstanceOf(EnvironmentError);
  });
});
