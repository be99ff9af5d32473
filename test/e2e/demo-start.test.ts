// SPDX-License-Identifier: AGPL-3.0-or-later
// The demo is what a newcomer sees first: a wrong start is told in one sentence, before anything is made.
import { execFile, execFileSync } from "node:child_process";
import { readdirSync } from "node:fs";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type Bundle, buildProgram } from "../support/programs/bundle.ts";

let demo: Bundle;
let work: string;

beforeAll(async () => {
  demo = await buildProgram("fixtures/demo/demo.ts");
  work = await mkdtemp(path.join(tmpdir(), "demo-start-"));
});

afterAll(async () => {
  await demo[Symbol.asyncDispose]();
  await rm(work, { recursive: true, force: true });
});

function start(parent: string, ...args: string[]): Promise<{ exitCode: number | null; text: string }> {
  const env = { ...process.env, TMPDIR: parent, NO_COLOR: "1" };
  return new Promise((resolve) => {
    const child = execFile(process.execPath, [demo.path, ...args], { env }, (_error, stdout, stderr) =>
      resolve({ exitCode: child.exitCode, text: (stdout + stderr).trim() }),
    );
  });
}

describe("the demo", () => {
  it("refuses arguments", async () => {
    const text = 'The demo failed: unknown argument "--nope": the demo takes none';
    expect(await start(work, "--nope")).toEqual({ exitCode: 1, text });
    expect(readdirSync(work)).toEqual([]);
  });

  it("says that its folder is missing, or none", async () => {
    const missing = path.join(work, "missing");
    const file = path.join(work, "file");
    await writeFile(file, "");
    for (const [parent, state] of [
      [missing, "no such file or directory (ENOENT)"],
      [file, "a part of the path is not a directory (ENOTDIR)"],
    ] as const) {
      const text = `The demo failed: Cannot create a directory in "${parent}": ${state}; set TMPDIR to another directory`;
      expect(await start(parent)).toEqual({ exitCode: 1, text });
    }
    await rm(file);
  });

  it("says how much room it needs", async () => {
    const small = path.join(work, "small");
    await mkdir(small);
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=8m", "tmpfs", small]);
    try {
      const text = `The demo failed: "${small}" has 8.0 MiB free, 2.0 GiB are needed; set TMPDIR to another directory`;
      expect(await start(small)).toEqual({ exitCode: 1, text });
      expect(readdirSync(small)).toEqual([]);
    } finally {
      execFileSync("umount", [small]);
      await rm(small, { recursive: true });
    }
  });
});
