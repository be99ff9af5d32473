// SPDX-License-Identifier: AGPL-3.0-or-later
// Paths longer than PATH_MAX, which a user inside a container makes with mkdir and cd alone.
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { inspectArchive } from "../../../src/archive/index.ts";
import { openRegularFile } from "../../../src/host/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { KINDS, type Kind, makeWorkFolder, unpack, writeArchive } from "./support.ts";

const work = makeWorkFolder();
const tree = join(work.path, "tree");
/** As docs/container-archives.md promises, with the "./" in front. */
const LIMIT_BYTES = 3840;
/** Source: pve-storage, PVE::Storage::Plugin, @COMMON_TAR_FLAGS. */
const PVE_TAR_FLAGS = [
  ...["--one-file-system", "-p", "--sparse", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=user.*"],
  ...["--xattrs-include=security.capability", "--warning=no-xattr-write"],
];

/**
 * Descends from $ARGV[0] by chdir, as no path would get there. Below "deep" each directory is 200 bytes; in each there
 * is a file, and where the limit lies are names whose paths have just its length, and one byte more.
 */
const DESCEND = `
  my ($root, $limit) = @ARGV;
  sub touch { open(my $f, ">", $_[0]) or die "$_[0]: $!"; print $f "precious"; close($f) }
  chdir($root) or die; mkdir "deep" or die; chdir "deep" or die;
  my $length = length("./deep");
  for my $level (0 .. 24) {
    my $rest = $limit - $length - 1;
    if ($rest > 1 && $rest <= 254) {
      touch("x" x $rest); touch("." . "y" x $rest); touch("z" x ($rest + 1)); mkdir("d" x ($rest + 1)) or die;
      system("setfattr", "-n", "user.note", "-v", "kept", "x" x $rest) == 0 or die;
    }
    touch("leaf");
    mkdir("n" x 200) or die; chdir("n" x 200) or die; $length += 201;
  }
`;

/** Every path, as find sees it. */
const pathsIn = (folder: string): string[] =>
  execFileSync("find", [".", "-printf", "%p\\0"], { cwd: folder, encoding: "latin1", maxBuffer: 2 ** 26 })
    .split("\0")
    .filter((path) => path !== "")
    .sort();

const restorable = (): string[] => pathsIn(tree).filter((path) => path.length <= LIMIT_BYTES);

/** Too long, but not the directory around them. */
const cutAt = (): string[] =>
  pathsIn(tree).filter((path) => path.length > LIMIT_BYTES && path.lastIndexOf("/") <= LIMIT_BYTES);

beforeAll(() => {
  mkdirSync(join(tree, "sbin"), { recursive: true });
  for (let n = 0; n < 10; n++) writeFileSync(join(tree, `sbin/f${n}`), `${n}`);
  writeFileSync(join(tree, "zlast"), "after all the long ones");
  execFileSync("perl", ["-e", DESCEND, tree, String(LIMIT_BYTES)]);
  for (const name of ["n".repeat(255), `.${"h".repeat(254)}`]) writeFileSync(join(tree, name), name);
  execFileSync("ln", ["-s", "t".repeat(4095), join(tree, "longest-link")]);
  mkdirSync(join(tree, "a/".repeat(1100)), { recursive: true }); // more levels than a process may have open files
});
afterAll(() => {
  execFileSync("rm", ["-rf", work.path]);
});

describe("a tree with paths longer than PATH_MAX", () => {
  it("is one that the stock tools store and cannot restore", () => {
    const plain = join(work.path, "plain.tar");
    execFileSync("tar", ["-C", tree, "-cf", plain, "."]);
    mkdirSync(join(work.path, "plain"));
    expect(() => unpackByTar(plain, join(work.path, "plain"))).toThrow(/File name too long/);
    expect(pathsIn(tree).some((path) => path.length > 4096)).toBe(true);
  });

  it.each(KINDS)(
    "is restored from %s by the stock tools, all but those paths, and the log says so",
    async (kind, context) => {
      requireTool(context as never, "mksquashfs", "unsquashfs", "setfattr");
      const archive = join(work.path, `long.${kind === "tar" ? "tar" : "sqfs"}`);
      const { log, summary } = await writeArchive(kind, archive, { directory: tree });
      expect(log.filter((line) => line.startsWith("warn"))).toEqual([
        `warn left out ${cutAt().length} files and directories with a path longer than 3840 bytes, ` +
          `which no restore can create: the first begins with "${cutAt()[0]?.slice(0, 80)}..."`,
      ]);
      expect(summary.warnings).toBe(1);
      const copy = join(work.path, `copy-${kind}`);
      unpack(kind, archive, copy);
      const wanted = restorable();
      expect(pathsIn(copy)).toEqual(wanted);
      expect(wanted.some((path) => path.length === LIMIT_BYTES)).toBe(true);
      const longest = wanted.find((path) => path.length === LIMIT_BYTES && path.endsWith("x")) ?? "";
      expect(execFileSync("getfattr", ["--only-values", "-n", "user.note", longest], { cwd: copy }).toString()).toBe(
        "kept",
      );
      expect(readFileSync(join(copy, "zlast"), "utf8")).toBe("after all the long ones");
      await using file = await openRegularFile(archive);
      expect((await inspectArchive(file, new AbortController().signal)).members).toBe(wanted.length);
      restoreAsPveDoes(kind, archive, copy);
    },
  );

  it.each(KINDS)("is archived to %s without a word where a pattern excludes the long paths", async (kind) => {
    for (const pattern of ["/deep", "nn*"]) {
      const archive = join(work.path, `excluded.${kind}`);
      const { log, summary } = await writeArchive(kind, archive, { directory: tree, excludePatterns: [pattern] });
      expect({ pattern, warnings: log.filter((line) => line.startsWith("warn")) }).toEqual({ pattern, warnings: [] });
      expect(summary.warnings).toBe(0);
      expect(statSync(archive).size).toBeGreaterThan(0);
      execFileSync("rm", [archive]);
    }
  });

  it.each(KINDS)("counts those of all sources for %s, each from its own mount", async (kind) => {
    const archive = join(work.path, `sources.${kind}`);
    const { log } = await writeArchive(kind, archive, { directory: tree, sources: ["./sbin", "./deep"] });
    expect(log.filter((line) => line.startsWith("warn left out "))).toHaveLength(1);
    const copy = join(work.path, `sources-${kind}`);
    unpack(kind, archive, copy);
    const isBelow = /^\.(?:$|\/(?:sbin|deep)(?:$|\/))/;
    expect(pathsIn(copy)).toEqual(restorable().filter((path) => isBelow.test(path)));
  });
});

function unpackByTar(archive: string, to: string): void {
  execFileSync("tar", ["-C", to, "-xpf", archive], { stdio: ["ignore", "ignore", "pipe"], maxBuffer: 2 ** 26 });
}

/** The commands of PVE::LXC::Create. @param unpacked stands for the mounted image */
function restoreAsPveDoes(kind: Kind, archive: string, unpacked: string): void {
  const root = join(work.path, `pve-${kind}`);
  mkdirSync(root);
  const extract = ["xpf", "-", "--totals", ...PVE_TAR_FLAGS, "-C", root, "--skip-old-files"];
  const create = ["cpf", "-", ...PVE_TAR_FLAGS.slice(1), `--directory=${unpacked}`, "."];
  const script =
    kind === "tar" ? 'tar "$@" < "$ARCHIVE"' : `tar ${create.map((flag) => `'${flag}'`).join(" ")} | tar "$@"`;
  execFileSync("bash", ["-c", `set -o pipefail; ${script}`, "bash", ...extract, "--anchored", "--exclude", "./dev/*"], {
    env: { ...process.env, ARCHIVE: archive },
    stdio: ["ignore", "ignore", "pipe"],
  });
  expect(pathsIn(root)).toEqual(restorable());
}
