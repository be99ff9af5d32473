// SPDX-License-Identifier: AGPL-3.0-or-later
// Folders of a place that somebody else changes while they are in use.
import { execFileSync } from "node:child_process";
import {
  chmod,
  chown,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { FileProblem, Folder } from "../../../src/host/index.ts";
import { requireRoot, requireTool } from "../../support/programs/tools.ts";

let dir: string;
let share: string;
let host: string;
let folder: Folder;
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "pbh-folder-"));
  share = join(dir, "share");
  host = join(dir, "host");
  await mkdir(share);
  await mkdir(host);
  await writeFile(join(host, "secret"), "of the host");
  folder = await Folder.open(share);
});
afterEach(async () => {
  await folder[Symbol.asyncDispose]();
  await rm(dir, { recursive: true });
});

describe("Folder.open()", () => {
  it("follows the administrator's links, also relative ones and those that go up", async () => {
    await mkdir(join(dir, "a/b"), { recursive: true });
    await symlink("../../share", join(dir, "a/b/up"));
    await symlink(join(dir, "a/b"), join(dir, "to-b"));
    await using found = await Folder.open(join(dir, "to-b/up/."));
    expect(found.identity).toEqual(folder.identity);
  });

  it("refuses a link that lies on a share, where others may have put it, and folders of a share it takes", async (context) => {
    requireTool(context, "mksquashfs", "squashfuse_ll", "fusermount3");
    await mkdir(join(dir, "tree/backups"), { recursive: true });
    await symlink(host, join(dir, "tree/link"));
    execFileSync("mksquashfs", [join(dir, "tree"), join(dir, "image"), "-no-progress"], { stdio: "pipe" });
    await mkdir(join(dir, "mount"));
    execFileSync("squashfuse_ll", [join(dir, "image"), join(dir, "mount")]); // FUSE counts as a share
    try {
      await using _found = await Folder.open(join(dir, "mount/backups"));
      await symlink(join(dir, "mount"), join(dir, "to-mount")); // the administrator's own
      await using _through = await Folder.open(join(dir, "to-mount/backups"));
      for (const path of ["mount/link", "to-mount/link"]) {
        await expect(Folder.open(join(dir, path))).rejects.toThrow(
          /^"link" in it is a symbolic link on a network share/,
        );
      }
    } finally {
      execFileSync("fusermount3", ["-u", "-z", join(dir, "mount")]);
    }
  });

  it("refuses a link in a local folder that others can change, and folders below it it takes", async () => {
    const theirs = join(dir, "theirs");
    await mkdir(join(theirs, "backups"), { recursive: true });
    await symlink(host, join(theirs, "link"));
    for (const [uid, gid, mode] of [
      [65_534, 0, 0o755],
      [0, 0, 0o1777],
      [0, 65_534, 0o775],
    ] as const) {
      await chown(theirs, uid, gid);
      await chmod(theirs, mode);
      await using _backups = await Folder.open(join(theirs, "backups"));
      await expect(Folder.open(join(theirs, "link"))).rejects.toThrow(
        /^"link" in it is a symbolic link in a folder that others can change$/,
      );
    }
    await chown(theirs, 0, 0);
    await using _link = await Folder.open(join(theirs, "link")); // of root's own group it may be
  });

  it("goes through folders that may be entered and not read", async () => {
    await chmod(dir, 0o711);
    await mkdir(join(share, "backups"));
    await chmod(share, 0o711);
    await chmod(join(share, "backups"), 0o755);
    process.seteuid?.(65_534);
    try {
      await using found = await Folder.open(join(share, "backups"));
      expect(await found.list()).toEqual([]);
      await expect(Folder.open(share)).rejects.toMatchObject({ code: "EACCES" }); // itself is to be read
    } finally {
      process.seteuid?.(0);
    }
  });

  it("names what is not there, not a directory, or a circle of links", async () => {
    await symlink("loop", join(dir, "loop"));
    await expect(Folder.open(join(dir, "none/x"))).rejects.toMatchObject({ code: "ENOENT" });
    await expect(Folder.open(join(host, "secret"))).rejects.toThrow(/^it is not a directory$/);
    await expect(Folder.open(join(dir, "loop"))).rejects.toThrow(/too many links/);
  });

  it("goes on with the folder that was opened when another one gets its name", async () => {
    await rename(share, `${share}.moved`);
    await symlink(host, share);
    await using file = await folder.createFile("new");
    await file.writeFile("x");
    expect(await folder.list()).toEqual(["new"]);
    expect(await readdir(host)).toEqual(["secret"]);
    expect(await readdir(`${share}.moved`)).toEqual(["new"]);
  });
});

describe("Folder", () => {
  it("follows no link, whatever is asked of it", async () => {
    await symlink(host, join(share, "folder"));
    await symlink(join(host, "secret"), join(share, "file"));
    await expect(folder.openFolder("folder")).rejects.toThrow(/^it is a symbolic link, not a directory$/);
    await expect(folder.openFile("file")).rejects.toThrow(/^it is a symbolic link, not a file$/);
    await expect(folder.openForUpdate("file")).rejects.toThrow(FileProblem);
    await expect(folder.createFile("file")).rejects.toMatchObject({ code: "EEXIST" });
    expect(await folder.makeFolder("folder")).toBe(false);
    expect(await folder.look("file")).toMatchObject({ kind: "link" });
    await writeFile(join(share, "mine"), "mine");
    await folder.rename("mine", folder, "file"); // takes the link's place
    expect(await readFile(join(share, "file"), "utf8")).toBe("mine");
    expect(await folder.removeFile("folder")).toBe(true);
    expect(await readFile(join(host, "secret"), "utf8")).toBe("of the host");
  });

  it.each(["", ".", "..", "a/b", "/etc", "a\0b"])("takes %j for no name", async (name) => {
    await expect(folder.openFile(name)).rejects.toThrow(TypeError);
    await expect(folder.removeFile(name)).rejects.toThrow(TypeError);
  });

  it("makes folders and files that only their owner may use", async () => {
    await folder.makeFolder("a");
    await using _file = await folder.createFile("b");
    expect((await stat(join(share, "a"))).mode & 0o777).toBe(0o700);
    expect((await stat(join(share, "b"))).mode & 0o777).toBe(0o600);
  });

  it("is not held up by a FIFO", async () => {
    execFileSync("mkfifo", [join(share, "fifo")]);
    await expect(folder.openFile("fifo")).rejects.toThrow(/^it is a named pipe, not a file$/);
    await expect(folder.openForUpdate("fifo")).rejects.toThrow(/^it is a named pipe, not a file$/);
  });
});

describe("Folder.remove()", () => {
  it("removes everything below a name, and of a link only the link", async () => {
    await mkdir(join(share, "a/b"), { recursive: true });
    await symlink(host, join(share, "a/b/link"));
    execFileSync("mkfifo", [join(share, "a/fifo")]);
    await folder.remove("a");
    await folder.remove("a"); // what is not there is removed
    expect(await folder.list()).toEqual([]);
    expect(await readdir(host)).toEqual(["secret"]);
  });

  it("removes names that are not UTF-8, of files and of directories", async () => {
    const raw = (...parts: Array<string | number[]>): Buffer =>
      Buffer.concat([Buffer.from(`${share}/tree/`), ...parts.map((part) => Buffer.from(part as string))]);
    await mkdir(join(share, "tree"));
    await mkdir(raw([0xff, 0xfe]));
    await writeFile(raw([0xff, 0xfe], "/", [0x80]), "x");
    await writeFile(raw([0xc3]), "x");
    await folder.remove("tree");
    expect(await readdir(share)).toEqual([]);
  });

  it("does not go into another file system", async (context) => {
    requireTool(context, "mount", "umount");
    requireRoot(context);
    await mkdir(join(share, "a/b"), { recursive: true });
    await writeFile(join(share, "a/removed"), "");
    execFileSync("mount", ["-t", "tmpfs", "tmpfs", join(share, "a/b")]);
    try {
      await writeFile(join(share, "a/b/kept"), "");
      await expect(folder.remove("a")).rejects.toThrow(/is on another file system, remove it by hand/);
      expect(await readdir(join(share, "a/b"))).toEqual(["kept"]);
      expect(await readdir(join(share, "a"))).toEqual(["b"]); // the rest is gone
    } finally {
      execFileSync("umount", [join(share, "a/b")]);
    }
  });

  it("gives up on what is nested too deeply", async () => {
    await mkdir(join(share, Array(60).fill("d").join("/")), { recursive: true });
    await expect(folder.remove("d")).rejects.toThrow(/nested too deeply/);
  });
});

it("leaves no descriptor open", async () => {
  const openNow = async (): Promise<string[]> => {
    const names = await readdir("/proc/self/fd");
    const targets = await Promise.all(names.map((name) => readlink(`/proc/self/fd/${name}`).catch(() => "")));
    return targets.filter((target) => target.startsWith(dir));
  };
  await mkdir(join(share, "a/b"), { recursive: true });
  await writeFile(join(share, "a/f"), "x");
  {
    await using a = await folder.openFolder("a");
    await a.readFile("f", 10);
    await folder.openFolder("none").catch(() => undefined);
    await a.openFolder("f").catch(() => undefined);
    await a.openFile("b").catch(() => undefined);
    await folder.remove("a");
  }
  expect(await openNow()).toEqual([share]);
});
