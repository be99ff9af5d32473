// SPDX-License-Identifier: AGPL-3.0-or-later
// A tree made to be difficult, archived in and out of a user namespace, unpacked by the stock tools and
// compared name by name.
import { execFileSync } from "node:child_process";
import { chownSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { inspectSquashfs, inspectTar } from "../../../src/archive/inspect.ts";
import { openRegularFile } from "../../../src/host/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import {
  archiveAsContainer,
  attributesIn,
  bundleJobRunner,
  describeTree,
  HOST_SHIFT,
  KINDS,
  type Kind,
  makeDifficultTree,
  makeWorkFolder,
  unpack,
  writeArchive,
} from "./support.ts";

const work = makeWorkFolder();
/** The 8 GiB that make a tar header overflow mean nothing to squashfs but a minute of zeros. */
const SPARSE = { tar: "9G", squashfs: "70M" } as const;
const privilegedTree = (kind: Kind): string => join(work.path, `privileged-${kind}`);
const unprivilegedTree = (kind: Kind): string => join(work.path, `unprivileged-${kind}`);
const never = new AbortController().signal;
let runner = "";

beforeAll(async () => {
  for (const kind of KINDS) {
    makeDifficultTree(privilegedTree(kind), { sparse: SPARSE[kind] });
    makeDifficultTree(unprivilegedTree(kind), { sparse: SPARSE[kind], shift: HOST_SHIFT });
  }
  runner = await bundleJobRunner(work.path);
});
afterAll(() => work[Symbol.dispose]());

const withoutLostAndFound = (lines: string[]): string[] => lines.filter((line) => !line.startsWith("lost+found"));

function aclsIn(folder: string): string[] {
  return attributesIn(folder, { acls: true }).filter((line) => line.includes("posix_acl"));
}

describe("a difficult tree, as root", () => {
  it.each(KINDS)("comes out of %s as it went in", async (kind, context) => {
    requireTool(context as never, "setfacl", "setfattr", "setcap", "mksquashfs");
    const archive = join(work.path, `root.${kind}`);
    const { summary, log } = await writeArchive(kind, archive, {
      directory: privilegedTree(kind),
      compression: "zstd",
    });
    const copy = `${archive}.d`;
    unpack(kind, archive, copy);
    const wanted = withoutLostAndFound(describeTree(privilegedTree(kind)));
    expect(describeTree(copy)).toEqual(wanted);
    expect(wanted.length).toBeGreaterThan(40);
    expect(summary.files).toBe(wanted.length);
    expect(attributesIn(copy)).toEqual(attributesIn(privilegedTree(kind)));
    expect(attributesIn(copy).some((line) => line.includes("security.capability"))).toBe(true);
    expect(aclsIn(privilegedTree(kind))).toHaveLength(3); // of two inodes: one has a second name
    expect(aclsIn(copy)).toEqual(kind === "tar" ? aclsIn(privilegedTree(kind)) : []);
    expect(log.some((line) => /ACLs: 2 left out \(1 access and 1 default\)/.test(line))).toBe(kind === "squashfs");
    expect(log.filter((line) => line.includes("left out 1 socket"))).toHaveLength(1);
    expect(summary.warnings).toBe(kind === "squashfs" ? 1 : 0);
    rmSync(copy, { recursive: true });
  });

  it.each(KINDS)("lists the whole %s without unpacking it", async (kind) => {
    const archive = join(work.path, `root.${kind}`);
    const wanted = withoutLostAndFound(describeTree(privilegedTree(kind), { contents: false }));
    await using file = await openRegularFile(archive);
    const contents = await (kind === "tar" ? inspectTar : inspectSquashfs)(file, never);
    expect(contents.members).toBe(wanted.length);
    expect(contents.hasSbin).toBe(true);
    expect(contents.totalBytes).toBeGreaterThan(kind === "tar" ? 9 * 2 ** 30 : 70 * 2 ** 20);
  });

  it("keeps what is sparse sparse in a tar", async () => {
    const archive = join(work.path, "sparse.tar");
    await writeArchive("tar", archive, { directory: privilegedTree("tar"), excludePatterns: ["/usr"] });
    expect(statSync(archive).size).toBeLessThan(2 * 2 ** 20);
  });
});

describe("a difficult tree, in a user namespace", () => {
  it.each(KINDS)("comes out of %s with the owners that the container sees", async (kind, context) => {
    requireTool(context as never, "newuidmap", "unshare", "setfacl", "mksquashfs");
    const archive = join(work.path, `mapped.${kind}`);
    writeFileSync(archive, "", { mode: 0o600, flag: "wx" });
    if (kind === "squashfs") chownSync(archive, HOST_SHIFT, HOST_SHIFT); // opened again by mksquashfs
    const result = await archiveAsContainer(work.path, runner, kind, archive, unprivilegedTree(kind));
    expect(result.error).toBeUndefined();
    expect(result.uid).toBe(0);
    const copy = `${archive}.d`;
    unpack(kind, archive, copy);
    expect(describeTree(copy)).toEqual(
      withoutLostAndFound(describeTree(unprivilegedTree(kind), { ownerShift: HOST_SHIFT })),
    );
    // Capabilities hold the owner of their namespace outside, and none as the container sees them.
    expect(attributesIn(copy)).toEqual(attributesIn(privilegedTree(kind)));
    if (kind === "tar") expect(aclsIn(copy)).toEqual(aclsIn(privilegedTree(kind)));
    expect(execFileSync("getcap", [join(copy, "usr/bin/setgid")], { encoding: "utf8" })).toMatch(/cap_net_raw=ep$/m);
    rmSync(copy, { recursive: true });
  });

  it.each(KINDS)("fails for %s on a file that the container cannot read, and names it", async (kind, context) => {
    requireTool(context as never, "newuidmap", "unshare", "mksquashfs");
    const tree = join(work.path, `unreadable-${kind}`);
    execFileSync("sh", [
      "-c",
      'mkdir "$0" && echo x > "$0/foreign" && chmod 0600 "$0/foreign" && chown 100000 "$0"',
      tree,
    ]);
    const archive = join(work.path, `unreadable.${kind}`);
    writeFileSync(archive, "", { mode: 0o600 });
    chownSync(archive, HOST_SHIFT, HOST_SHIFT);
    const { error } = await archiveAsContainer(work.path, runner, kind, archive, tree);
    expect(error).toMatch(/Cannot archive .*foreign/);
  });
});
