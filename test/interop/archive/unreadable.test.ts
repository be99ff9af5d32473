// SPDX-License-Identifier: AGPL-3.0-or-later
// What is there and cannot be read: an archive without it must not pass for a backup. GNU tar fails by itself;
// mksquashfs goes on, and ends with status 0.
import { chownSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { requireTool } from "../../support/programs/tools.ts";
import {
  archiveAsContainer,
  bundleJobRunner,
  HOST_SHIFT,
  KINDS,
  type Kind,
  makeWorkFolder,
  namesIn,
  run,
  unpack,
  writeArchive,
} from "./support.ts";

const TOOLS = { tar: "tar", squashfs: "mksquashfs" } as const;
const work = makeWorkFolder();
let runner = "";
beforeAll(async () => {
  runner = await bundleJobRunner(work.path);
});
afterAll(() => work[Symbol.dispose]());

const makeTree = async (name: string, perl: string): Promise<string> => {
  const tree = join(work.path, name);
  mkdirSync(tree);
  const help =
    'chdir($ARGV[0]) or die $!; sub put { open(F, ">", $_[0]) or die $!; print F "precious" x 100; close(F) }';
  await run("perl", ["-e", `${help} ${perl}`, tree]);
  return tree;
};

/** @returns what the archiver of a container says of this tree, whose root is the container's and the rest is not */
async function failureOf(kind: Kind, name: string, perl: string): Promise<string> {
  const tree = await makeTree(`${name}-${kind}`, perl);
  const archive = `${tree}.archive`;
  writeFileSync(archive, "", { mode: 0o600 });
  for (const path of [tree, archive]) chownSync(path, HOST_SHIFT, HOST_SHIFT);
  return String((await archiveAsContainer(work.path, runner, kind, archive, tree)).error);
}

describe.each(KINDS)("an archive by %s", (kind) => {
  it.for([
    ["a file", 'put("plain"); chmod(0600, "plain")'],
    ["a file whose name is not UTF-8", String.raw`put("\xdcbung"); chmod(0600, "\xdcbung")`],
    ["a file with line breaks in its name", String.raw`put("a\nb\nc"); chmod(0600, "a\nb\nc")`],
    ["a folder whose name is not UTF-8", String.raw`mkdir("B\xfccher"); put("B\xfccher/f"); chmod(0700, "B\xfccher")`],
    ["files of a folder that can be listed, not entered", 'mkdir("d"); put("d/$_") for 1 .. 3; chmod(0744, "d")'],
  ] as const)("fails where the container may not read %s", async ([what, perl], context) => {
    requireTool(context, TOOLS[kind], "newuidmap");
    expect(await failureOf(kind, what.replaceAll(" ", "-"), perl)).toMatch(/Error: Cannot (?:archive|list) "/);
  });

  it("leaves out what lies deeper than any restore can reach, says so, and holds the rest", async (context) => {
    requireTool(context, TOOLS[kind]);
    const perl = 'for (1 .. 25) { mkdir("d" x 200) or die; chdir("d" x 200) or die; put("precious$_") }';
    const directory = await makeTree(`deep-${kind}`, perl);
    const archive = `${directory}.archive`;
    const { log } = await writeArchive(kind, archive, { directory });
    expect(log.join("\n")).toMatch(/left out 1 file or directory with a path longer than 3840 bytes/);
    const list = kind === "tar" ? await run("tar", ["tf", archive]) : await run("unsquashfs", ["-lc", archive]);
    expect(list.stdout.match(/precious\d+$/gm)?.map((file) => Number(file.slice(8)))).toEqual(
      expect.arrayContaining(Array.from({ length: 18 }, (_, index) => index + 1)),
    );
    unpack(kind, archive, `${directory}.out`); // which says if it cannot
    await run("rm", ["-rf", directory, `${directory}.out`]); // Node's own rm() cannot
  });

  it("fails where the listing of a folder breaks off", async (context) => {
    requireTool(context, TOOLS[kind], "debugfs");
    const directory = join(work.path, `damaged-${kind}`);
    // One block of a folder is overwritten; checksums tell the kernel.
    const script = `set -e
      truncate -s 64M "$0.img"; mkfs.ext4 -q -F -b 1024 "$0.img"; mkdir "$0"; mount -o loop "$0.img" "$0"
      mkdir "$0/d"; for i in $(seq 400); do echo x > "$0/d/a-long-name-that-fills-blocks-$i"; done
      umount "$0"
      block=$(debugfs -R 'blocks /d' "$0.img" 2> /dev/null | tr ' ' '\\n' | sed -n 10p)
      dd if=/dev/urandom of="$0.img" bs=1024 seek="$block" count=1 conv=notrunc status=none
      mount -o loop,errors=continue "$0.img" "$0"`;
    await run("bash", ["-c", script, directory]).catch((error: unknown) => context.skip(`cannot mount: ${error}`));
    try {
      await expect(writeArchive(kind, `${directory}.archive`, { directory })).rejects.toThrow(/: Bad message$/);
    } finally {
      await run("umount", [directory]);
    }
  });

  it("takes a source by its own name where tar reads escapes", async (context) => {
    requireTool(context, TOOLS[kind]);
    const directory = join(work.path, `escape-${kind}`);
    mkdirSync(join(directory, "mnt/a\\101"), { recursive: true });
    mkdirSync(join(directory, "mnt/aA"));
    await run("mount", ["-t", "tmpfs", "test", join(directory, "mnt/a\\101")]);
    try {
      writeFileSync(join(directory, "mnt/a\\101/precious"), "data");
      const archive = `${directory}.archive`;
      await writeArchive(kind, archive, { directory, sources: ["./", "./mnt/a\\101"] });
      unpack(kind, archive, `${directory}-copy`);
      expect(namesIn(`${directory}-copy`)).toEqual(["", "mnt", "mnt/aA", "mnt/a\\101", "mnt/a\\101/precious"]);
    } finally {
      await run("umount", [join(directory, "mnt/a\\101")]);
    }
  });
});
