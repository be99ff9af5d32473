// SPDX-License-Identifier: AGPL-3.0-or-later
// The tests of the Nth operation are worth as much as what fault-fs.ts sees: strace says whether the kernel was asked
// for any change of the store, of the witness or of the folder for mounts that it did not count.
import { execFile } from "node:child_process";
import { mkdir, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { build } from "esbuild";
import { expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { type Change, readChanges, STRACE_ARGS } from "../support/fault/strace-changes.ts";
import { requireTool } from "../support/programs/tools.ts";
import { BareDisk } from "../support/vm/bare-disk.ts";

const run = promisify(execFile);
const root = fileURLToPath(new URL("../../", import.meta.url));

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
    for (const name of ["store", "root/etc/pve/priv", "root/run"]) {
      await mkdir(path.join(dir, name), { recursive: true });
    }
    await build({
      ...{ absWorkingDir: root, entryPoints: ["test/support/fault/fault-seen.ts"], outfile: bundle, bundle: true },
      ...{ platform: "node", format: "esm", target: "node20.19", external: ["koffi"], logLevel: "warning" },
      banner: { js: 'import { createRequire as r } from "node:module"; const require = r(import.meta.url);' },
    });
    await using disk = await BareDisk.start(path.join(dir, "disk"), "drive-scsi0", seededBytes("seen", 3 * 2 ** 20));
    const socket = disk.volume("none").nbdPath ?? "";
    const image = path.join(dir, "image.sqfs");
    await run("mksquashfs", [path.join(root, "docs"), image, "-no-progress"]);
    const job = [bundle, dir, socket, String(disk.sizeBytes), image];
    const { stdout } = await run("strace", [...STRACE_ARGS, "-o", `${dir}/trace`, process.execPath, ...job]);
    const seen = JSON.parse(stdout) as Change[];
    const asked = readChanges(await readFile(`${dir}/trace`, "utf8"), [`${dir}/store`, `${dir}/root`]);
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
