// SPDX-License-Identifier: AGPL-3.0-or-later
// Archives read back: listed end to end, and single files taken out, with damage and hostile moves.
import { execFileSync, spawnSync } from "node:child_process";
import {
  copyFileSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { Writable } from "node:stream";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { extractFile, listTar, type TarMember } from "../../../src/archive/browse.ts";
import { inspectArchive } from "../../../src/archive/index.ts";
import { type ArchiveContents, inspectSquashfs, inspectTar } from "../../../src/archive/inspect.ts";
import { CancelledError } from "../../../src/core/index.ts";
import { mustCreateDigester } from "../../../src/digest/digest.ts";
import { digestFile, verifyFile } from "../../../src/digest/index.ts";
import { openRegularFile } from "../../../src/host/index.ts";
import { makeDifficultTree, makeWorkFolder, writeArchive } from "./support.ts";

const work = makeWorkFolder();
const tree = join(work.path, "tree");
const never = new AbortController().signal;
const COMPRESSIONS = ["none", "zlib", "zstd"] as const;
const tarOf = (compression: string): string => join(work.path, `tree.${compression}.tar`);
const imageOf = (compression: string): string => join(work.path, `tree.${compression}.sqfs`);

beforeAll(async () => {
  makeDifficultTree(tree, { sparse: "40M" });
  for (const compression of COMPRESSIONS) {
    await writeArchive("tar", tarOf(compression), { directory: tree, compression });
    await writeArchive("squashfs", imageOf(compression), { directory: tree, compression });
  }
});
afterAll(() => work[Symbol.dispose]());

/** Names and sizes as the shell counts them; the socket and lost+found are in no archive. */
function truth(): { members: number; totalBytes: number } {
  const list = (...tests: string[]): string[] =>
    execFileSync("find", [".", "-name", "lost+found", "-prune", "-o", "!", "-type", "s", ...tests], {
      cwd: tree,
      encoding: "latin1",
    })
      .split("\0")
      .slice(0, -1);
  const sizes = list("-type", "f", "-printf", "%i %s\\0").map((line) => line.split(" "));
  const bySharedInode = new Map(sizes.map(([inode, size]) => [inode, Number(size)]));
  const totalBytes = [...bySharedInode.values()].reduce((sum, size) => sum + size, 0);
  return { members: list("-printf", "x\\0").length, totalBytes };
}

async function contentsOf(inspect: typeof inspectTar, path: string, signal = never): Promise<ArchiveContents> {
  await using file = await openRegularFile(path);
  return await inspect(file, signal);
}
const tarContents = (path: string, signal = never) => contentsOf(inspectTar, path, signal);
const imageContents = (path: string) => contentsOf(inspectSquashfs, path);

describe("inspectTar()", () => {
  it.each(COMPRESSIONS)("counts what is in a tar with compression %s", async (compression) => {
    expect(await tarContents(tarOf(compression))).toEqual({ ...truth(), hasSbin: true });
  });

  it.each(COMPRESSIONS)("refuses a tar with compression %s that is cut off", async (compression) => {
    const path = join(work.path, `cut.${compression}.tar`);
    copyFileSync(tarOf(compression), path);
    truncateSync(path, compression === "none" ? 100_000 : 1_000);
    await expect(tarContents(path)).rejects.toMatchObject({ code: "CHILD_PROCESS" });
  });

  it("refuses a tar that is cut off anywhere: GNU tar itself does not always notice", async () => {
    const directory = join(work.path, "three-files");
    mkdirSync(directory);
    for (const name of ["a", "b", "c"]) writeFileSync(join(directory, name), name.repeat(1500));
    const whole = join(work.path, "three-files.tar");
    execFileSync("tar", ["-cf", whole, "-C", directory, "."]);
    const endMarkAt = (1 + 3 * (1 + 3)) * 512; // a folder, and three files of three blocks of data
    expect(
      readFileSync(whole)
        .subarray(endMarkAt, endMarkAt + 1024)
        .every((byte) => byte === 0),
    ).toBe(true);
    let unnoticed = 0;
    for (let size = 512; size <= endMarkAt; size += 512) {
      const path = join(work.path, "cut-anywhere.tar");
      copyFileSync(whole, path);
      truncateSync(path, size);
      if (spawnSync("tar", ["-tf", path]).status === 0) unnoticed++;
      await expect(tarContents(path), `cut at ${size}`).rejects.toMatchObject({ code: "CHILD_PROCESS" });
    }
    expect(unnoticed).toBeGreaterThan(0);
    expect(await tarContents(whole)).toMatchObject({ members: 4, totalBytes: 4500 });
  });

  it("refuses a damaged header in the middle", async () => {
    const path = join(work.path, "damaged.tar");
    copyFileSync(tarOf("none"), path);
    const headerAt = readFileSync(path).indexOf("./usr/bin/tool", 600);
    writeSync(openSync(path, "r+"), "DAMAGE", headerAt);
    await expect(tarContents(path)).rejects.toThrow(/Cannot list/);
  });

  it.each([
    ["a folder", 'mkdir "$0/sbin"', true],
    ["a symbolic link", 'ln -s usr/sbin "$0/sbin"', true],
    ["nothing of the name", 'mkdir "$0/bin"', false],
    ["a file", ': > "$0/sbin"', false],
    ["a folder elsewhere", 'mkdir -p "$0/usr/sbin"', false],
    ["a name that claims it", 'mkdir -p "$0/x\n./sbin/"', false],
  ])("sees %s as PVE does", async (title, command, hasSbin) => {
    const directory = join(work.path, title.replaceAll(" ", "-"));
    mkdirSync(directory);
    execFileSync("sh", ["-c", command, directory]);
    await writeArchive("tar", `${directory}.tar`, { directory });
    await writeArchive("squashfs", `${directory}.sqfs`, { directory });
    expect((await tarContents(`${directory}.tar`)).hasSbin).toBe(hasSbin);
    expect((await imageContents(`${directory}.sqfs`)).hasSbin).toBe(hasSbin);
  });

  it("reads the file it was given, from its start, whatever has its name by now", async () => {
    const path = join(work.path, "swapped.tar");
    copyFileSync(tarOf("none"), path);
    await using file = await openRegularFile(path);
    rmSync(path);
    writeFileSync(path, "somebody else's");
    await file.handle.read(Buffer.alloc(512)); // its position is not at its start
    for (let round = 0; round < 2; round++) expect(await inspectTar(file, never)).toMatchObject(truth());
    expect((await file.handle.read(Buffer.alloc(1))).bytesRead).toBe(1); // still open, and not read to its end
  });

  it("ends with the reason of its signal", async () => {
    const reason = new CancelledError("stop");
    await expect(tarContents(tarOf("zstd"), AbortSignal.abort(reason))).rejects.toBe(reason);
  });
});

describe("inspectSquashfs()", () => {
  it.each(COMPRESSIONS)("counts what is in an image with compression %s", async (compression) => {
    const { members, totalBytes } = truth();
    const contents = await imageContents(imageOf(compression));
    expect(contents.members).toBe(members);
    expect(contents.hasSbin).toBe(true);
    expect(contents.totalBytes).toBeGreaterThanOrEqual(totalBytes); // a second name of a file is listed with its size
  });

  it("refuses an image that is cut off, and one that is none", async () => {
    const cut = join(work.path, "cut.sqfs");
    copyFileSync(imageOf("none"), cut);
    truncateSync(cut, 100_000);
    await expect(imageContents(cut)).rejects.toThrow(/100000 bytes, expected \d+/);
    writeFileSync(join(work.path, "none.sqfs"), Buffer.alloc(4096));
    await expect(imageContents(join(work.path, "none.sqfs"))).rejects.toThrow(/not a squashfs image/);
  });

  it("refuses an image whose tables are damaged", async () => {
    const path = join(work.path, "damaged.sqfs");
    copyFileSync(imageOf("zstd"), path);
    const bytes = readFileSync(path);
    const inodeTable = Number(bytes.readBigUInt64LE(64)); // "inode_table_start" of the superblock
    writeSync(openSync(path, "r+"), Buffer.alloc(64, 0xff), 0, 64, inodeTable);
    await expect(imageContents(path)).rejects.toMatchObject({ code: "CHILD_PROCESS" });
  });
});

describe("inspectArchive() and verifyFile()", () => {
  it.each([
    ["tar", "swapped-again.tar", tarOf("zstd"), tarOf("none")],
    ["squashfs", "swapped-again.sqfs", imageOf("zstd"), imageOf("none")],
  ])("look at the open file, not at its name (%s)", async (_kind, name, original, other) => {
    const path = join(work.path, name);
    copyFileSync(original, path);
    await using file = await openRegularFile(path);
    const digest = await digestFile(file, mustCreateDigester("sha256", path), never);
    copyFileSync(other, `${path}.new`);
    renameSync(`${path}.new`, path);
    expect(await verifyFile(file, digest, never)).toBe(true);
    writeFileSync(path, "somebody else's");
    expect((await inspectArchive(file, never)).members).toBe(truth().members);
    expect(await verifyFile(file, { ...digest, value: "00" }, never)).toBe(false);
  });
});

async function members(path: string): Promise<TarMember[]> {
  await using file = await openRegularFile(path);
  const found: TarMember[] = [];
  for await (const member of listTar(file, never)) found.push(member);
  return found;
}

async function extracted(path: string, name: string): Promise<Buffer> {
  const chunks: Buffer[] = [];
  const sink = new Writable({
    write(chunk: Buffer, _encoding, done) {
      chunks.push(Buffer.from(chunk));
      setImmediate(done);
    },
  });
  await using file = await openRegularFile(path);
  await extractFile(file, name, sink, never);
  return Buffer.concat(chunks);
}

describe("listTar()", () => {
  it.each(COMPRESSIONS)("tells name, type, size, owner and mode with compression %s", async (compression) => {
    const all = await members(tarOf(compression));
    expect(all).toHaveLength(truth().members);
    const byName = new Map(all.map((member) => [member.name, member]));
    expect(byName.get("./usr/bin/setgid")).toMatchObject({ type: "file", size: 1, mode: 0o2755, uid: 0 });
    expect(byName.get("./sym")).toMatchObject({ type: "symlink", linkName: "usr/bin/tool", uid: 33, gid: 44 });
    expect(byName.get("./sparse")).toMatchObject({ type: "file", size: 40 * 2 ** 20 + 7 });
    expect(byName.get("./fifo")).toMatchObject({ type: "fifo", mtimeMs: Date.UTC(2001, 1, 3, 4, 5, 6) });
    expect(byName.get("./null")).toMatchObject({ type: "character-device" });
    expect(byName.get("./we ird/new\nline")).toMatchObject({ type: "file" });
    expect(all.filter((member) => member.type === "link")).toHaveLength(2);
  });

  it("stops where its reader stops", async () => {
    await using file = await openRegularFile(tarOf("zstd"));
    for await (const member of listTar(file, never)) {
      expect(member.name).toBe("./");
      break;
    }
  });

  it("says so when the archive is cut off", async () => {
    const path = join(work.path, "cut-list.tar");
    copyFileSync(tarOf("none"), path);
    truncateSync(path, 100_000);
    await expect(members(path)).rejects.toThrow();
  });
});

describe("extractFile()", () => {
  it.each(COMPRESSIONS)(
    "takes files out of a tar with compression %s, sparse ones with their holes",
    async (compression) => {
      for (const name of ["usr/bin/tool", "./we ird/new\nline", "holes", "sparse"]) {
        const bytes = await extracted(tarOf(compression), name);
        // A hard link is stored once, under the name that tar met first.
        expect(bytes.equals(readFileSync(join(tree, name)))).toBe(true);
      }
    },
  );

  it("names what is wrong with the name", async () => {
    await expect(extracted(tarOf("none"), "no/such")).rejects.toThrow(/no such member/);
    await expect(extracted(tarOf("none"), "sbin")).rejects.toThrow(/is a directory/);
    await expect(extracted(tarOf("none"), "sym")).rejects.toMatchObject({ hint: 'it points to "usr/bin/tool"' });
  });
});
