// SPDX-License-Identifier: AGPL-3.0-or-later
// The tests of the Nth operation are worth as much as what fault-fs.ts sees: strace says whether the kernel was asked
// for any change of the store, of the witness or of the folder for mounts that it did not count.
import { execFile } from "node:child_process";
import { mkdir, mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { build } from "esbuild";
import { expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { BareDisk } from "../support/bare-disk.ts";
import { requireTool } from "../support/tools.ts";

const run = promisify(execFile);
const root = fileURLToPath(new URL("../../", import.meta.url));

/** Every call of Linux by which a file, a folder or what is known of them changes or becomes durable. */
const KIND_OF_CALL: Readonly<Record<string, string>> = {
  ...{ write: "write", pwrite64: "write", writev: "write", pwritev: "write", pwritev2: "write" },
  ...{ fsync: "sync", fdatasync: "sync", sync_file_range: "sync", syncfs: "sync", msync: "sync" },
  ...{ rename: "rename", renameat: "rename", renameat2: "rename", link: "link", linkat: "link" },
  ...{ unlink: "unlink", unlinkat: "unlink", rmdir: "rmdir", mkdir: "mkdir", mkdirat: "mkdir" },
  ...{ chmod: "chmod", fchmod: "chmod", fchmodat: "chmod", chown: "chown", fchown: "chown", lchown: "chown" },
  ...{ fchownat: "chown", truncate: "truncate", ftruncate: "truncate", symlink: "symlink", symlinkat: "symlink" },
  ...{ mknod: "mknod", mknodat: "mknod", fallocate: "fallocate", copy_file_range: "copy", sendfile: "copy" },
  ...{ splice: "copy", utimensat: "times", futimesat: "times", setxattr: "xattr", fsetxattr: "xattr" },
  ...{ lsetxattr: "xattr", io_uring_setup: "io_uring" },
};

interface Change {
  readonly kind: string;
  readonly path: string;
}

/** A line of strace -y: `pwrite64(23</the/file>, "..."..., 512, 0) = 512`. Calls that failed changed nothing. */
function parseCall(line: string, folder: string): Change | undefined {
  const [, call = "", given = ""] = /^(\w+)\((.*)\)\s+= \d/.exec(line) ?? [];
  const args = given.replace(/AT_FDCWD<([^>]*)>, "([^"]*)"/g, (_, cwd, name) => `"${path.resolve(cwd, name)}"`);
  const paths = [...args.matchAll(/"(\/[^"]*)"|<(\/[^>]*)>/g)].map((match) => match[1] ?? match[2] ?? "");
  const file = paths.filter((one) => one.startsWith(folder)).at(call === "openat" ? 0 : -1);
  if (file === undefined) return undefined;
  if (call !== "openat" && call !== "open") return { kind: KIND_OF_CALL[call] ?? call, path: file };
  if (/O_CREAT/.test(args)) return { kind: "create", path: file };
  return /O_WRONLY|O_RDWR/.test(args) ? { kind: "open", path: file } : undefined;
}

/** How often each change was made. A folder made with its parents is one call of Node and several of the kernel. */
function countChanges(changes: readonly Change[]): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const { kind, path: file } of changes) {
    if (kind === "close" || kind === "mkdir") continue;
    const name = `${kind} ${file}`;
    counts[name] = (counts[name] ?? 0) + 1;
  }
  return counts;
}

it("fault-fs.ts sees every change that the kernel is asked for", { timeout: 120_000 }, async (context) => {
  requireTool(context, "strace", "mksquashfs", "squashfuse_ll");
  const dir = await mkdtemp(path.join(tmpdir(), "pbh-seen-"));
  const bundle = `${root}dist/test/fault-seen-${process.pid}.mjs`;
  try {
    for (const name of ["store", "root/etc/pve/priv", "root/run", "trace"]) {
      await mkdir(path.join(dir, name), { recursive: true });
    }
    await build({
      ...{ absWorkingDir: root, entryPoints: ["test/support/fault-seen.ts"], outfile: bundle, bundle: true },
      ...{ platform: "node", format: "esm", target: "node20.19", external: ["koffi"], logLevel: "warning" },
      banner: { js: 'import { createRequire as r } from "node:module"; const require = r(import.meta.url);' },
    });
    await using disk = await BareDisk.start(path.join(dir, "disk"), "drive-scsi0", seededBytes("seen", 3 * 2 ** 20));
    const calls = ["open", "openat", ...Object.keys(KIND_OF_CALL)].join(",");
    const args = ["-ff", "-y", "-s", "1", "-e", `trace=?${calls.replaceAll(",", ",?")}`, "-o", `${dir}/trace/t`];
    const socket = disk.volume("none").nbdPath ?? "";
    const image = path.join(dir, "image.sqfs");
    await run("mksquashfs", [path.join(root, "docs"), image, "-no-progress"]);
    const job = [bundle, dir, socket, String(disk.sizeBytes), image];
    const { stdout } = await run("strace", [...args, process.execPath, ...job]);
    const seen = JSON.parse(stdout) as Change[];
    const asked: Change[] = [];
    for (const file of await readdir(path.join(dir, "trace"))) {
      for (const line of (await readFile(path.join(dir, "trace", file), "utf8")).split("\n")) {
        for (const folder of [`${dir}/store`, `${dir}/root`]) {
          const change = parseCall(line, folder);
          if (change !== undefined) asked.push(change);
        }
      }
    }
    expect(seen.length).toBeGreaterThan(80);
    expect(seen.some((one) => one.path.endsWith("/owner.json"))).toBe(true);
    expect(countChanges(seen)).toEqual(countChanges(asked));
    const made = seen.filter(({ kind }) => kind === "mkdir").map((one) => one.path);
    for (const { path: file } of asked.filter(({ kind }) => kind === "mkdir")) {
      expect(
        made.some((one) => one === file || one.startsWith(`${file}/`)),
        file,
      ).toBe(true);
    }
  } finally {
    await rm(bundle, { force: true });
    await rm(dir, { recursive: true, force: true });
  }
});
