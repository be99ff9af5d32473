// SPDX-License-Identifier: AGPL-3.0-or-later
// A chain is read all the way down before it is built on, and what has not changed since is not read again.
import { execFileSync } from "node:child_process";
import { chmod, mkdir, open, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { openChain } from "../../../src/store/chain.ts";
import { PointDamagedError, type Store } from "../../../src/store/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { createLab, type Lab, makeLegacy, NEVER, readJson } from "./lab.ts";

/** Images whose tables were read. */
const read = vi.hoisted(() => [] as string[]);
vi.mock("../../../src/qcow2/index.ts", async (original) => {
  const real = await original<typeof import("../../../src/qcow2/index.ts")>();
  return {
    ...real,
    checkQcow2: async (...args: Parameters<typeof real.checkQcow2>) => {
      read.push(args[0].path.split("/").at(-2) ?? "");
      return await real.checkQcow2(...args);
    },
  };
});

let lab: Lab;
beforeEach(async (context) => {
  requireTool(context, "qemu-img", "qemu-io");
  lab = await createLab();
  // Images by qemu-img, in the example's folders: a chain needs no commit to be looked at.
  const image = (epoch: number): string => join(lab.path, `100/qemu-${epoch}/drive-scsi0.qcow2`);
  for (const epoch of [100, 200, 300]) {
    await makeLegacy(lab, `qemu-${epoch}`, { "drive-scsi0": Buffer.alloc(0) });
    await rm(image(epoch));
    const backing = epoch === 100 ? [] : ["-b", image(epoch - 100), "-F", "qcow2"];
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", ...backing, image(epoch), "8M"]);
    execFileSync("qemu-io", ["-c", `write -P ${epoch / 100} 0 1M`, image(epoch)]);
  }
});
afterEach(() => lab?.[Symbol.asyncDispose]());

const baseImage = (): string => join(lab.path, "100/qemu-100/drive-scsi0.qcow2");
const memoryFile = (): string => join(lab.root, "var/cache/pve-backup-host/bk/100.json");

/** What a backup does before it builds on qemu-300; returns what was read for it. */
async function check(store?: Store): Promise<string[]> {
  const asked = store ?? (await lab.open());
  read.length = 0;
  await using points = await asked.pointsOf(100);
  await using chain = await openChain(points, await asked.openPoint("100/qemu-300", NEVER), "drive-scsi0", NEVER);
  await asked.assertChainSound("build on it", 100, chain, NEVER);
  return [...read];
}

describe("assertChainSound()", () => {
  it("reads every image once, and the topmost one always, in this process and the next", async () => {
    const store = await lab.open();
    expect(await check(store)).toEqual(["qemu-300", "qemu-200", "qemu-100"]);
    expect(await check(store)).toEqual(["qemu-300"]);
    expect(await check()).toEqual(["qemu-300"]);
  });

  it.each([
    ["given another mode", () => chmod(baseImage(), 0o640)],
    [
      "replaced by a copy with its times",
      async () => {
        execFileSync("cp", ["-p", baseImage(), `${baseImage()}.copy`]);
        await rename(`${baseImage()}.copy`, baseImage());
      },
    ],
  ])("reads an image again that was %s", async (_how, change) => {
    await check();
    await change();
    expect(await check()).toEqual(["qemu-300", "qemu-100"]);
  });

  it("finds a table at the bottom that was overwritten since", async () => {
    await check();
    await using handle = await open(baseImage(), "r+");
    const header = Buffer.alloc(104);
    await handle.read(header, 0, 104, 0);
    const l1 = Buffer.alloc(8);
    await handle.read(l1, 0, 8, Number(header.readBigUInt64BE(40)));
    await handle.write(Buffer.alloc(65536), 0, 65536, Number(l1.readBigUInt64BE() & 0x00ffffffffffffffn)); // L2
    await expect(check()).rejects.toThrow(PointDamagedError);
    await expect(check()).rejects.toThrow(/the tables of ".*qemu-100\/drive-scsi0\.qcow2" are damaged/);
  });

  it("reads everything where the record is missing, damaged or cannot be written, and says so", async () => {
    await check();
    await writeFile(memoryFile(), "{");
    expect(await check()).toHaveLength(3);
    expect((await readJson(memoryFile())).images).toHaveLength(3);
    await rm(memoryFile());
    await mkdir(memoryFile());
    expect(await check()).toHaveLength(3);
    expect(lab.warnings).toEqual([expect.stringMatching(/^Cannot remember which images are sound: .*100\.json/)]);
  });
});
