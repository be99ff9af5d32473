// SPDX-License-Identifier: AGPL-3.0-or-later
// What killed processes left and cannot be removed: every job that comes across it says so in its log.
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";

const never = new AbortController().signal;
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

let dir: string;
let provider: DirectoryProvider;
let warnings: string[];

beforeEach(async () => {
  dir = await mkdtemp(path.join(os.tmpdir(), "sweep-warnings-"));
  stubborn.path = path.join(dir, "root/run/pve-backup-host/restore-999999999-0");
  for (const folder of [path.join(dir, "store"), path.join(dir, "root/etc/pve/priv"), stubborn.path]) {
    await mkdir(folder, { recursive: true });
  }
  warnings = [];
  const context = {
    ...{ storeid: "bk", nodename: "node1" },
    scfg: { path: path.join(dir, "store"), "dir-compression": "none" },
    log: (level: string, message: string): void => void (level === "warn" && warnings.push(message)),
  };
  provider = new DirectoryProvider(context, { root: path.join(dir, "root") });
});

afterEach(async () => {
  await provider[Symbol.asyncDispose]();
  expect(warnings).toEqual([`Cannot remove "${stubborn.path}": failed (EBUSY)`]);
  stubborn.path = "";
  await rm(dir, { recursive: true });
});

describe("a folder that cannot be swept", () => {
  it("is warned of by the restore of a VM", async () => {
    await expect(provider.restore.restoreVmInit("backup/100/qemu-1700000000", never)).rejects.toThrow(
      /: there is no such backup$/,
    );
  });

  it("is warned of by the restore of a container", async () => {
    const volname = "backup/101/lxc-1700000000";
    await expect(provider.restore.restoreContainerInit(volname, never)).rejects.toThrow(/: there is no such backup$/);
  });

  it("is warned of by the backup of a container, which goes on", async () => {
    await provider.backup.backupInit(101, "lxc", 1_700_000_000, never);
    const info = { directory: dir, sources: ["./"], backupUserId: 0, bandwidthLimit: 0, firewallConfig: undefined };
    const [, socket] = await provider.backup.backupContainerPrepare(101, info, never);
    expect(socket?.path).toMatch(/\/handoff-\d+-0\/sock$/);
  });
});
