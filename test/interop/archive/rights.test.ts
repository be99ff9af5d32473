// SPDX-License-Identifier: AGPL-3.0-or-later
// What a tool may do that reads a foreign archive: programs of the tools' names look at themselves, and try.
import { chmodSync, copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { inspectArchive } from "../../../src/archive/index.ts";
import { openRegularFile } from "../../../src/host/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { makeWorkFolder, writeArchive } from "./support.ts";

const work = makeWorkFolder();
const bin = join(work.path, "bin");
const rootsFile = join(work.path, "roots-file");
const rootsSecret = join(work.path, "roots-secret");
const path = process.env.PATH ?? "";
const NOBODY = "Uid: 65534 65534 65534 65534 Gid: 65534 65534 65534 65534 Groups: ";
const CAP_DAC_READ_SEARCH = (1 << 2).toString(16).padStart(16, "0");

/** Says on one line what it is, and whether it can read and write files of root's. */
const LOOK = `#!/bin/sh
cd /proc/self && what=$(grep -E '^(Uid|Gid|Groups|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs):' status | tr -s '\\n\\t ' ' ')
( echo overwritten > "${rootsFile}" ) 2>/dev/null && what="$what wrote"
( head -c 1 "${rootsSecret}" ) >/dev/null 2>&1 && what="$what read"
echo "$what" >&2
exit 2
`;

beforeAll(async () => {
  mkdirSync(join(work.path, "tree"));
  await writeArchive("tar", join(work.path, "a.tar"), { directory: join(work.path, "tree") });
  await writeArchive("tar", join(work.path, "a.tar.zst"), { directory: join(work.path, "tree"), compression: "zstd" });
  await writeArchive("squashfs", join(work.path, "a.sqfs"), { directory: join(work.path, "tree") });
  mkdirSync(bin);
});
beforeEach((context) => {
  requireTool(context, "setpriv", "mksquashfs", "zstd");
  if (process.getuid?.() !== 0) context.skip("needs root");
  writeFileSync(rootsFile, "root's");
  chmodSync(rootsFile, 0o644);
  writeFileSync(rootsSecret, "root's", { mode: 0o600 });
});
afterEach(() => {
  process.env.PATH = path;
});
afterAll(() => work[Symbol.dispose]());

async function rightsOf(tool: string, archive: string): Promise<string> {
  writeFileSync(join(bin, tool), LOOK, { mode: 0o755 });
  process.env.PATH = `${bin}:${path}`;
  await using file = await openRegularFile(join(work.path, archive));
  const error = await inspectArchive(file, new AbortController().signal).catch((thrown: Error) => thrown);
  return String(error);
}

const capabilities = (set: string): string =>
  `CapPrm: ${set} CapEff: ${set} CapBnd: ${set} CapAmb: ${set} NoNewPrivs: 1`;

describe("the rights of a tool that reads a foreign archive", () => {
  it.each([
    ["tar", "a.tar"],
    ["zstd", "a.tar.zst"],
  ])("%s is nobody and has none at all", async (tool, archive) => {
    const said = await rightsOf(tool, archive);
    expect(said).toContain(`${NOBODY}${capabilities("0".repeat(16))}`);
    expect(said).not.toMatch(/wrote|read$/);
    expect(readFileSync(rootsFile, "utf8")).toBe("root's");
  });

  it("unsquashfs is nobody and can only read", async () => {
    const said = await rightsOf("unsquashfs", "a.sqfs");
    expect(said).toContain(`${NOBODY}${capabilities(CAP_DAC_READ_SEARCH)}`);
    expect(said).toMatch(/ read$/); // the test's own proof that it would see a file written
    expect(readFileSync(rootsFile, "utf8")).toBe("root's");
  });

  it("lists an archive that root alone may open, in a folder that root alone may enter", async () => {
    const folder = join(work.path, "closed");
    mkdirSync(folder, { mode: 0o700 });
    for (const archive of ["a.tar.zst", "a.sqfs"]) {
      copyFileSync(join(work.path, archive), join(folder, archive));
      await using file = await openRegularFile(join(folder, archive));
      expect((await inspectArchive(file, new AbortController().signal)).members).toBe(1);
    }
  });
});
