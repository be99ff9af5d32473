// SPDX-License-Identifier: AGPL-3.0-or-later
import { mkdtemp, readdir, readlink, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { openScratchFile } from "../../../src/archive/scratch-file.ts";

let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(path.join(os.tmpdir(), "pbh-scratch-"));
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await rm(dir, { recursive: true, force: true });
});

/** Where the file without a name is. */
async function folderOf(fd: number): Promise<string> {
  return path.dirname((await readlink(`/proc/self/fd/${fd}`)).replace(/ \(deleted\)$/, ""));
}

describe("openScratchFile()", () => {
  it("makes a file without a name below TMPDIR, ours alone", async () => {
    vi.stubEnv("TMPDIR", dir);
    await using file = await openScratchFile();
    expect(await folderOf(file.fd)).toBe(dir);
    expect(await readdir(dir)).toEqual([]);
    expect((await file.stat()).mode & 0o7777).toBe(0o600);
    await file.write("a list");
    expect((await file.read(Buffer.alloc(6), 0, 6, 0)).buffer.toString()).toBe("a list");
  });

  it("takes /tmp where TMPDIR is closed to us, as root's is to the root of a container", async () => {
    vi.stubEnv("TMPDIR", path.join(dir, "missing"));
    await using file = await openScratchFile();
    expect(await folderOf(file.fd)).toBe("/tmp");
  });
});
