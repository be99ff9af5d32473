// SPDX-License-Identifier: AGPL-3.0-or-later
// Verification of containers, with damage that only their archive shows.
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { copyFile, type FileHandle, mkdir, mkdtemp, open, readFile, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { listArchive } from "../../../src/maintenance/container.ts";
import { type Finding, verifyPoint } from "../../../src/maintenance/index.ts";
import { Store } from "../../../src/store/index.ts";
import { requireTool } from "../../support/programs/tools.ts";

const run = promisify(execFile);
const never = new AbortController().signal;
type Kind = "tar" | "sqfs";
let dir: string;
let store: Store;
let findings: Finding[];

beforeEach(async (context) => {
  requireTool(context, "tar", "mksquashfs", "unsquashfs");
  findings = [];
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
  await rm(dir, { recursive: true, force: true });
});

async function verify(): Promise<void> {
  await verifyPoint(store, "101/lxc-1000", never, (finding) => Promise.resolve(void findings.push(finding)));
}

/** By the stock tools, without compression: not every changed byte makes them fail. */
async function makeArchive(kind: Kind): Promise<string> {
  const file = path.join(dir, `archive.${kind}`);
  if (kind === "tar") await run("tar", ["-C", path.join(dir, "tree"), "-cf", file, "."]);
  else await run("mksquashfs", [path.join(dir, "tree"), file, "-no-progress", "-noI", "-noD", "-noF", "-noX"]);
  return file;
}

/** @returns the archive in the store */
async function commit(kind: Kind, record: { hasSbin?: boolean; members?: number } = {}): Promise<string> {
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
  const container = { archive: name, members: 12, totalBytes: 1, hasSbin: true, warnings: 0, ...record };
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

/** A disk whose reads fail for us; the tools read the same file by themselves. */
function failingAfter(handle: FileHandle): FileHandle {
  const fail = (): Promise<never> => Promise.reject(Object.assign(new Error("EIO"), { code: "EIO", syscall: "read" }));
  return new Proxy(handle, {
    get: (target, name) => (name === "read" ? fail : Reflect.get(target, name, target)),
  });
}

describe.each(["tar", "sqfs"] as const)("verifyPoint() of a container's archive.%s", (kind) => {
  it("finds one changed byte", async () => {
    const archive = await commit(kind);
    await verify();
    expect(findings).toEqual([
      { kind: "archive", archive: "101/lxc-1000", file: `archive.${kind}`, algorithm: "sha256", members: undefined },
      { kind: "whole", archive: "101/lxc-1000", isPrivileged: true },
    ]);
    await using file = await open(archive, "r+");
    const at = (await readFile(archive)).indexOf("precious 7");
    await file.write("P", at);
    await expect(verify()).rejects.toMatchObject({
      code: "DAMAGED",
      message: `Cannot use "${archive}": checksum mismatch (sha256)`,
    });
  });

  it("lists one without a record to its end", async () => {
    const archive = await makeLegacy(kind);
    await verify();
    expect(findings).toMatchObject([{ kind: "archive", algorithm: undefined, members: 12 }, { kind: "whole" }]);
    const whole = await readFile(archive);
    await using file = await open(archive, "r+");
    // The header of the second member; the table of inodes.
    await file.write(Buffer.alloc(16, 0xff), 0, 16, kind === "tar" ? 512 + 148 : Number(whole.readBigUInt64LE(64)));
    await expect(verify()).rejects.toMatchObject({
      code: "DAMAGED",
      message: expect.stringMatching(/^Cannot list /),
    });
    for (const bytes of [20_480, 10]) {
      await writeFile(archive, whole.subarray(0, bytes));
      await expect(verify()).rejects.toMatchObject({
        code: "DAMAGED",
        message: expect.stringMatching(
          /it has no manifest, and its archive\.\w+ (?:is cut off|is not a squashfs image)$/,
        ),
      });
    }
  });
});

describe("verifyPoint()", () => {
  it.each([
    [{ hasSbin: false }, 'it has no directory or link "sbin" at its top'],
    [{ members: 9 }, "it has 9 members, fewer than 10"],
  ])("does not call a tar restorable that Proxmox VE refuses: %j", async (record, reason) => {
    await commit("tar", record);
    await expect(verify()).rejects.toMatchObject({
      code: "NOT_SUPPORTED",
      message: `Cannot restore "backup/101/lxc-1000": Proxmox VE refuses archive.tar: ${reason}`,
    });
    expect(findings).toMatchObject([{ kind: "archive", algorithm: "sha256" }]); // its content is in order
  });

  it("knows that nobody looks for sbin in a directory, which a squashfs image is restored from", async () => {
    await commit("sqfs", { hasSbin: false, members: 2 });
    await verify();
    expect(findings.at(-1)).toMatchObject({ kind: "whole" });
  });

  it("counts the members of a tar without a record itself", async () => {
    await rm(path.join(dir, "tree/sbin"), { recursive: true });
    await makeLegacy("tar");
    await expect(verify()).rejects.toMatchObject({ code: "NOT_SUPPORTED", message: expect.stringContaining('"sbin"') });
  });

  it("tells an unprivileged container from a privileged one, whatever its snapshots were", async () => {
    await makeLegacy("tar");
    const config = path.join(dir, "store/101/lxc-1000/guest.conf");
    for (const [text, isPrivileged] of [
      ["arch: amd64\nunprivileged: 1\n", false],
      ["arch: amd64\nunprivileged: 0\n", true],
      ["arch: amd64\n\n[before]\nunprivileged: 1\n", true],
    ] as const) {
      await writeFile(config, text);
      await verify();
      expect(findings.at(-1)).toMatchObject({ kind: "whole", isPrivileged });
    }
  });

  it("does not take a file that cannot be read for damage", async () => {
    const archive = await makeLegacy("tar");
    const point = await store.openPoint("101/lxc-1000", never);
    await using file = await point.openFile("archive.tar");
    await writeFile(archive, (await readFile(archive)).fill(0xff, 512, 1024)); // no header any more
    const failing = { ...file, handle: failingAfter(file.handle) };
    await expect(listArchive(failing, never)).rejects.toMatchObject({ code: "ENVIRONMENT", errno: "EIO" });
    await expect(listArchive(file, never)).rejects.toMatchObject({ code: "DAMAGED" });
  });
});
