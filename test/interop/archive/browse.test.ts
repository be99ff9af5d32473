// SPDX-License-Identifier: AGPL-3.0-or-later
// Sparse files as every GNU tar has stored them: read right, or refused.
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { createWriteStream, mkdirSync, openSync, readFileSync, truncateSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { extractFile, listTar } from "../../../src/archive/browse.ts";
import { openRegularFile } from "../../../src/host/index.ts";
import { makeWorkFolder } from "./support.ts";

const work = makeWorkFolder();
const tree = join(work.path, "tree");
const never = new AbortController().signal;

beforeAll(() => {
  mkdirSync(tree);
  writeFileSync(join(tree, "before"), "plain");
  const fd = openSync(join(tree, "sparse"), "w");
  for (let n = 0; n < 30; n++) writeSync(fd, `data ${n}`, n * 100_000); // more extents than one old header holds
  truncateSync(join(tree, "sparse"), 5_000_000);
  writeFileSync(join(tree, "zafter"), "plain, too");
});
afterAll(() => work[Symbol.dispose]());

function archive(name: string, ...flags: string[]): string {
  const path = join(work.path, name);
  execFileSync("tar", ["-C", tree, "--sparse", ...flags, "-cf", path, "before", "sparse", "zafter"]);
  return path;
}

async function sizesIn(path: string): Promise<Record<string, number>> {
  await using file = await openRegularFile(path);
  const sizes: Record<string, number> = {};
  for await (const { name, size } of listTar(file, never)) sizes[name] = size;
  return sizes;
}

async function extracted(path: string, name: string): Promise<Buffer> {
  await using file = await openRegularFile(path);
  const out = join(work.path, "out");
  const to = createWriteStream(out);
  await extractFile(file, name, to, never);
  if (!to.closed) await once(to, "close");
  return readFileSync(out);
}

describe("a sparse file in a tar", () => {
  it("of pax format 1.0 is listed and extracted with its holes", async () => {
    const path = archive("1.0.tar", "--format=pax", "--sparse-version=1.0");
    expect(await sizesIn(path)).toEqual({ before: 5, sparse: 5_000_000, zafter: 10 });
    expect((await extracted(path, "sparse")).equals(readFileSync(join(tree, "sparse")))).toBe(true);
  });

  it.each(["0.0", "0.1"])("of pax format %s is listed, and refused when it is to be extracted", async (version) => {
    const path = archive(`${version}.tar`, "--format=pax", `--sparse-version=${version}`);
    expect(await sizesIn(path)).toEqual({ before: 5, sparse: 5_000_000, zafter: 10 });
    await expect(extracted(path, "sparse")).rejects.toMatchObject({
      code: "NOT_SUPPORTED",
      message: `Cannot extract "sparse" from "${path}": it is a sparse file in a pax format other than 1.0`,
    });
    expect((await extracted(path, "zafter")).toString()).toBe("plain, too");
  });

  it("of GNU's old format is refused, and what follows is not guessed at", async () => {
    const path = archive("gnu.tar", "--format=gnu");
    const refusal = {
      code: "NOT_SUPPORTED",
      message: `Cannot read "${path}": member "sparse" is a sparse file in GNU's old format, or of an unknown type`,
    };
    await expect(sizesIn(path)).rejects.toMatchObject(refusal);
    for (const name of ["sparse", "zafter"]) await expect(extracted(path, name)).rejects.toMatchObject(refusal);
    expect((await extracted(path, "before")).toString()).toBe("plain");
  });
});
