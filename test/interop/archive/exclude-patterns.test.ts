// SPDX-License-Identifier: AGPL-3.0-or-later
// The excluded set, compared with what GNU tar itself leaves out.
import { execFileSync } from "node:child_process";
import { mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { requireTool } from "../../support/programs/tools.ts";
import { makeNamesTree, makeWorkFolder, namesIn, unpack, writeArchive } from "./support.ts";

const work = makeWorkFolder();
const tree = join(work.path, "tree");
let everything: string[] = [];

beforeAll(() => {
  makeNamesTree(tree);
  everything = namesIn(tree);
});
afterAll(() => work[Symbol.dispose]());

/** Plain tar with the options in PVE's order, written here by hand. */
function namesByPlainTar(patterns: readonly string[], sources: readonly string[], name: string): string[] {
  const archive = join(work.path, `${name}.plain.tar`);
  const unanchored = patterns.filter((pattern) => !pattern.startsWith("/")).map((pattern) => `--exclude=${pattern}`);
  const anchored = patterns.filter((pattern) => pattern.startsWith("/")).map((pattern) => `--exclude=.${pattern}`);
  const flags = ["--one-file-system", "-C", tree, "--no-anchored", "--exclude=lost+found", ...unanchored];
  execFileSync("tar", ["-cf", archive, ...flags, "--anchored", ...anchored, ...sources], {
    stdio: "ignore",
    env: { ...process.env, LC_ALL: "C" },
  });
  return unpackedNames("tar", archive);
}

function unpackedNames(kind: "tar" | "squashfs", archive: string): string[] {
  const folder = `${archive}.d`;
  unpack(kind, archive, folder);
  const names = namesIn(folder);
  rmSync(folder, { recursive: true });
  rmSync(archive);
  return names;
}

async function namesByUs(kind: "tar" | "squashfs", patterns: string[], sources: string[], name: string) {
  const archive = join(work.path, `${name}.${kind}`);
  await writeArchive(kind, archive, { directory: tree, sources, excludePatterns: patterns });
  return unpackedNames(kind, archive);
}

const PATTERNS: readonly string[][] = [
  ["/tmp/?*", "/var/tmp/?*", "/var/run/?*.pid"],
  ["*.log"],
  ["*.log*"],
  ["foo"],
  ["foo*"],
  ["*foo"],
  ["foo?"],
  ["foo/bar"],
  ["/foo"],
  ["/foo/bar"],
  ["/a/foo"],
  ["/a/f*"],
  ["/a*"],
  ["/*"],
  ["/?"],
  ["/tmp/*"],
  ["/tmp/"],
  ["tmp"],
  ["tmp/"],
  ["/tmp"],
  ["a*b"],
  ["opt/a?b"],
  ["a/b"],
  ["cache"],
  [".cache"],
  ["*cache*"],
  ["/home/*/.cache"],
  ["/home/**/draft.txt"],
  ["**/docs/*"],
  ["[draft].txt"],
  ["\\[draft\\].txt"],
  ["d\\*.txt"],
  ["back\\\\slash"],
  ["[!a-z]*"],
  ["x[0-9]"],
  ["etc/x\\[1]"],
  ["!bang"],
  ["{a,b}"],
  ["#hash"],
  [" space"],
  ["* *"],
  ["naïve"],
  ["na??ve"],
  ["new?line"],
  ["new\nline"],
  ["/home/u/new\nline"],
  ["..x"],
  [".*"],
  ["."],
  ["/."],
  ["*"],
  ["?*"],
  ["/mnt/data"],
  ["mnt", "/opt/a"],
  ["*.deb", "/var/run", "y.log", "/home/u/docs/*.txt"],
  ["[abc"],
  ["foo\\"],
  ["+(foo)"],
  ["/var/cache/*/archives"],
  ["/etc/x1", "/etc/x[[]1]"],
];

describe("exclude patterns", () => {
  it("has more than thirty of them, and most leave something out", () => {
    const working = PATTERNS.filter((patterns, index) => {
      return namesByPlainTar(patterns, ["./"], `count${index}`).length < everything.length - 4; // lost+found goes always
    });
    expect(PATTERNS.length).toBeGreaterThanOrEqual(30);
    expect(working.length).toBeGreaterThanOrEqual(30);
  });

  it.each(PATTERNS.map((patterns, index) => [JSON.stringify(patterns), patterns, index] as const))(
    "%s leaves out what GNU tar leaves out, in both kinds of archive",
    async (_title, patterns, index) => {
      const wanted = namesByPlainTar(patterns, ["./"], `p${index}`);
      expect(await namesByUs("tar", [...patterns], ["./"], `t${index}`)).toEqual(wanted);
      expect(await namesByUs("squashfs", [...patterns], ["./"], `s${index}`)).toEqual(wanted);
    },
  );
});

describe("sources", () => {
  it.each([
    [["./", "./mnt/data"], []],
    [["."], ["/tmp/?*"]],
    [["./mnt/data", "./mnt/other"], []],
    [["./mnt/data"], ["*.log"]],
    [["./", "./mnt/data"], ["/mnt"]],
    [["./", "./mnt/data"], ["data"]],
    [["./home/u/docs/", "./opt"], ["/home/u/docs/d*"]],
    [["./etc/naïve", "./a"], ["/a/b/"]],
  ])("%j without %j holds the same names as GNU tar's", async (sources, patterns) => {
    const name = `src${sources.join().replace(/\W/g, "_")}${patterns.length}`;
    const wanted = namesByPlainTar(patterns, sources, name);
    expect(await namesByUs("tar", patterns, sources, name)).toEqual(wanted);
    expect(await namesByUs("squashfs", patterns, sources, name)).toEqual(wanted);
  });

  it("keeps the folder of a file system that is no source, and leaves out what is on it", async (context) => {
    requireTool(context, "mount");
    const mounts = [join(tree, "mnt/other"), join(tree, "mnt/data")];
    mkdirSync(join(work.path, "file-mount"), { recursive: true });
    const mounted: string[] = [];
    try {
      for (const mount of mounts) {
        execFileSync("mount", ["-t", "tmpfs", "tmpfs", mount]);
        mounted.push(mount);
        execFileSync("sh", ["-c", 'mkdir -p "$0/deep" && : > "$0/deep/on-mount" && : > "$0/.dot"', mount]);
      }
      execFileSync("mount", ["--bind", join(tree, "mnt/data/.dot"), join(tree, "etc/x1")]);
      mounted.push(join(tree, "etc/x1"));
      const sources = ["./", "./mnt/data"];
      const wanted = namesByPlainTar([], sources, "mounts");
      expect(wanted).toContain("mnt/other");
      expect(wanted).toContain("mnt/data/deep/on-mount");
      expect(wanted).not.toContain("mnt/other/deep");
      expect(await namesByUs("tar", [], sources, "mounts")).toEqual(wanted);
      expect(await namesByUs("squashfs", [], sources, "mounts")).toEqual(wanted);
    } finally {
      for (const mount of mounted.reverse()) execFileSync("umount", [mount]);
    }
  });
});
