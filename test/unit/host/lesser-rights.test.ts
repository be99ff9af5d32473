// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, open, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { until } from "../../../fixtures/lab/index.ts";
import { readerFlags, readProcess, reopenerFlags } from "../../../src/host/index.ts";
import { bundleInto } from "../../support/programs/bundle.ts";
import { requireTool } from "../../support/programs/tools.ts";

const run = promisify(execFile);
const WITHOUT_CAPABILITIES = ["--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all"];
let dir: string;

beforeEach(async (context) => {
  requireTool(context, "setpriv", "unshare", "mksquashfs", "squashfuse_ll", "fusermount3");
  if (process.getuid?.() !== 0) context.skip("needs root");
  dir = await mkdtemp(path.join(os.tmpdir(), "lesser-rights-"));
});
afterEach(async () => {
  await rm(dir, { recursive: true, force: true });
});

describe("readerFlags()", () => {
  it("takes another user's ids", async () => {
    expect(await readerFlags()).toEqual(expect.arrayContaining(["--reuid", "65534", "--no-new-privs"]));
  });

  it("leaves the ids alone in a user namespace that has no others", async () => {
    const bundle = path.join(dir, "host.mjs");
    await bundleInto(bundle, "src/host/index.ts");
    const script = `import(${JSON.stringify(bundle)}).then(async (host) => console.log(JSON.stringify(await host.readerFlags())))`;
    const { stdout } = await run("unshare", ["--user", "--map-root-user", process.execPath, "-e", script]);
    expect(JSON.parse(stdout)).toEqual(WITHOUT_CAPABILITIES);
  });
});

describe("reopenerFlags()", () => {
  it("leaves the ids alone for a file that its server gives to nobody else, as NFS does", async () => {
    await writeFile(path.join(dir, "file"), "content", { mode: 0o600 });
    await run("mksquashfs", [path.join(dir, "file"), path.join(dir, "a.sqfs"), "-no-progress"]);
    await run("mkdir", [path.join(dir, "mnt")]);
    // Without allow_other, a FUSE file system is its user's alone, and no capability changes that.
    await run("squashfuse_ll", [path.join(dir, "a.sqfs"), path.join(dir, "mnt")]);
    const served = await open(path.join(dir, "mnt/file"), "r");
    try {
      expect(await reopenerFlags(served)).toEqual(WITHOUT_CAPABILITIES);
    } finally {
      await served.close();
      await run("fusermount3", ["-u", path.join(dir, "mnt")]);
    }
  });

  it("and readerFlags() do not undo the promise of --pdeathsig", async () => {
    await writeFile(path.join(dir, "file"), "content", { mode: 0o600 });
    const file = await open(path.join(dir, "file"), "r");
    for (const flags of [await readerFlags(), await reopenerFlags(file)]) {
      expect(flags).toContain("--reuid");
      const command = `setpriv --pdeathsig KILL ${flags.join(" ")} -- sleep 60 & echo $!; wait`;
      const shell = spawn("sh", ["-c", command], { stdio: ["ignore", "pipe", "ignore"] });
      const [line] = (await once(shell.stdout, "data")) as [Buffer];
      const pid = Number(line);
      await until("the program runs", async () => (await run("cat", [`/proc/${pid}/comm`])).stdout === "sleep\n");
      shell.kill("SIGKILL");
      await until("it is gone, too", async () => (await readProcess(pid)) === undefined);
    }
    await file.close();
  });
});
