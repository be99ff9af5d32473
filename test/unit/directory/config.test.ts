// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { parseConfig } from "../../../src/directory/config.ts";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";

const path = "/mnt/backup";

describe("parseConfig()", () => {
  it("has the documented defaults", () => {
    expect(parseConfig({ path })).toEqual({
      path,
      vmMechanism: "nbd",
      vmMode: "full",
      lxcMode: "tar",
      compression: "zstd",
      deviceView: "auto",
      nbdTimeoutSeconds: 300,
      fullReadEveryDays: 30,
      isRestoreVerified: true,
    });
  });

  it("takes every value that is documented, and PVE's own options", () => {
    const scfg = {
      ...{ path, type: "backup-provider-dir-example", content: { backup: 1 }, nodes: { pve1: 1 }, disable: 0 },
      ...{ shared: 1, is_mountpoint: "yes", "create-base-path": 0, "max-protected-backups": 5 },
      "prune-backups": "keep-last=3",
    };
    for (const [option, values] of [
      ["vm-backup-mechanism", ["nbd", "file-handle"]],
      ["vm-backup-mode", ["full", "incremental"]],
      ["lxc-backup-mode", ["tar", "squashfs"]],
      ["dir-compression", ["none", "zlib", "zstd"]],
      ["dir-device-view", ["auto", "fuse", "nbd"]],
    ] as const) {
      for (const value of values) expect(Object.values(parseConfig({ ...scfg, [option]: value }))).toContain(value);
    }
  });

  it.each([
    ["vm-backup-mode", "Incremental"],
    ["vm-backup-mode", ""],
    ["vm-backup-mechanism", "fuse"],
    ["lxc-backup-mode", 1],
    ["dir-compression", "gzip"],
    ["dir-compression", ["zstd"]],
    ["dir-device-view", "nbdfuse"],
  ])("refuses %s = %j and names what is expected", (option, value) => {
    const text = `Cannot use "${option}" of the storage: its value is ${JSON.stringify(value)}, expected one of `;
    expect(() => parseConfig({ path, [option]: value })).toThrow(text);
  });

  it.each([
    [5, 5],
    ["3600", 3600],
    ["0060", 60],
  ])("takes dir-nbd-timeout %j, a number or its text", (value, seconds) => {
    expect(parseConfig({ path, "dir-nbd-timeout": value }).nbdTimeoutSeconds).toBe(seconds);
  });

  it.each([
    [undefined, true],
    [1, true],
    ["1", true],
    [0, false],
    ["0", false],
  ])("takes dir-verify-restore %j", (value, isVerified) => {
    const section = value === undefined ? { path } : { path, "dir-verify-restore": value };
    expect(parseConfig(section).isRestoreVerified).toBe(isVerified);
  });

  it.each([2, "yes", "", true])("refuses dir-verify-restore %j", (value) => {
    expect(() => parseConfig({ path, "dir-verify-restore": value })).toThrow(/"dir-verify-restore".*expected 0 or 1$/);
  });

  it.each([4, 3601, 5.5, -300, "", "5s", "1e3", "0x10", true, [300]])("refuses dir-nbd-timeout %j", (value) => {
    const text = `Cannot use "dir-nbd-timeout" of the storage: its value is ${JSON.stringify(value)}, expected a number of seconds from 5 to 3600`;
    expect(() => parseConfig({ path, "dir-nbd-timeout": value })).toThrow(text);
  });

  it("refuses an option it does not know: a typing error must not pass for a default", () => {
    expect(() => parseConfig({ path, "vm-backup-mod": "incremental" })).toThrow(
      /^Cannot use option "vm-backup-mod" of the storage: it is unknown, expected one of .*vm-backup-mode/,
    );
    expect(() => parseConfig({ path, constructor: "x" })).toThrow(/unknown/);
  });

  it.each([undefined, "", "backup", "./x", 5, "/a\0b"])("refuses the path %j", (odd) => {
    expect(() => parseConfig({ path: odd })).toThrow(/Cannot use the storage path .*: expected an absolute path$/);
  });
});

describe("new DirectoryProvider()", () => {
  it("refuses a bad section before anything is done", () => {
    const context = { storeid: "bk", nodename: "n", log: () => undefined };
    expect(() => new DirectoryProvider({ ...context, scfg: { path, "vm-backup-mode": "often" } })).toThrow(/often/);
  });
});
