// SPDX-License-Identifier: AGPL-3.0-or-later
// `pve-backup-host check` of containers, with damage that only their archive shows.
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { copyFile, mkdir, mkdtemp, open, readFile, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { check } from "../../../src/cli/check.ts";
import { Store } from "../../../src/store/index.ts";
import { requireTool } from "../../support/programs/tools.ts";

const run = promisify(execFile);
const never = new AbortController().signal;
type Kind = "tar" | "sqfs";
let dir: string;
let store: Store;
let printed: string[];

beforeEach(async (context) => {
  requireTool(context, "tar", "mksquashfs", "unsquashfs");
  printed = [];
  vi.spyOn(console, "log").mockImplementation((line: string) => void printed.push(line));
  dir = await mkdtemp(path.join(os.tmpdir(), "pbh-check-"));
  for (const name of ["store", "root/etc/pve/priv", "tree/sbin"])
    await mkdir(path.join(dir, name), { recursive: true });
  for (let n = 0; n < 10; n++) await writeFile(path.join(dir, `tree/f${n}`), `precious ${n}\n`.repeat(1000));
  store = await Store.open({
    ...{ path: path.join(dir, "store"), storeid: "bk", root: path.join(dir, "root"), nodename: "node1" },
    warn: () => undefined,
  });
});

afterEach(async () => {
  vi.restoreAllMocks();
  await rm(dir, { recursive: true, force: true });
});

/** By the stock tools, without compression: not every changed byte makes them fail. */
async function makeArchive(kind: Kind): Promise<string> {
  const file = path.join(dir, `archive.${kind}`);
  if (kind === "tar") await run("tar", ["-C", path.join(dir, "tree"), "-cf", file, "."]);
  else await run("mksquashfs", [path.join(dir, "tree"), file, "-no-progress", "-noI", "-noD", "-noF", "-noX"]);
  return file;
}

/** @returns the archive in the store */
async function commit(kind: Kind): Promise<string> {
  const made = await makeArchive(kind);
  const value = createHash("sha256")
    .update(await readFile(made))
    .digest("hex");
  const name = path.basename(made);
  await using lock = await store.lockGuest(101, never);
  await using staged = await store.beginPoint({ lock, type: "lxc", epoch: 1000, signal: never });
  await staged.writeFile(name, await readFile(made));
  await staged.writeFile("guest.conf", Buffer.from("arch: amd64\n"));
  const digests = new Map([[name, { algorithm: "sha256", value } as const]]);
  const container = { archive: name, members: 12, totalBytes: 1, hasSbin: true, warnings: 0 };
  await staged.commit({ devices: [], digests, container }, never);
  return path.join(dir, "store/101/lxc-1000", name);
}

/** As the upstream example leaves one: no record. @returns the archive in the store */
async function makeLegacy(kind: Kind): Promise<string> {
  const made = await makeArchive(kind);
  const folder = path.join(dir, "store/101/lxc-1000");
  await mkdir(folder, { recursive: true });
  await writeFile(path.join(folder, "guest.conf"), "arch: amd64\n");
  await copyFile(made, path.join(folder, path.basename(made)));
  return path.join(folder, path.basename(made));
}

describe.each(["tar", "sqfs"] as const)("check() of a container's archive.%s", (kind) => {
  it("finds one changed byte", async () => {
    const archive = await commit(kind);
    await check(store, "101/lxc-1000", never);
    expect(printed).toEqual([`  101/lxc-1000 archive.${kind}: sha256 agrees`, "101/lxc-1000 can be restored"]);
    await using file = await open(archive, "r+");
    const at = (await readFile(archive)).indexOf("precious 7");
    await file.write("P", at);
    await expect(check(store, "101/lxc-1000", never)).rejects.toMatchObject({
      code: "DAMAGED",
      message: `Cannot use "${archive}": its sha256 digest is not the recorded one`,
    });
  });

  it("lists one without a record to its end", async () => {
    const archive = await makeLegacy(kind);
    await check(store, "101/lxc-1000", never);
    expect(printed).toEqual([
      `  101/lxc-1000 archive.${kind}: no digest is recorded, 12 members can be listed`,
      "101/lxc-1000 can be restored",
    ]);
    const whole = await readFile(archive);
    await using file = await open(archive, "r+");
    // The header of the second member; the table of inodes.
    await file.write(Buffer.alloc(16, 0xff), 0, 16, kind === "tar" ? 512 + 148 : Number(whole.readBigUInt64LE(64)));
    await expect(check(store, "101/lxc-1000", never)).rejects.toMatchObject({
      code: "DAMAGED",
      message: expect.stringMatching(/^Cannot list /),
    });
    for (const bytes of [20_480, 10]) {
      await writeFile(archive, whole.subarray(0, bytes));
      await expect(check(store, "101/lxc-1000", never)).rejects.toMatchObject({
        code: "DAMAGED",
        message: expect.stringMatching(
          /it has no manifest, and its archive\.\w+ (?:is cut off|is not a squashfs image)$/,
        ),
      });
    }
  });
});
