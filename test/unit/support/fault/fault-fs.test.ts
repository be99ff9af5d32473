// SPDX-License-Identifier: AGPL-3.0-or-later
// What goes through a descriptor is seen, named and made to fail by its real path.
// biome-ignore assist/source/organizeImports: it must come before the product
import { faultSwitch, type NamedCall, onNamedCall } from "../../../support/fault/fault-fs.ts";
import { mkdtemp, rename, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { Folder } from "../../../../src/host/index.ts";
import { realPathOf } from "../../../support/fault/proc-path.ts";

let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "pbh-names-"));
});
afterEach(async () => {
  onNamedCall(undefined);
  faultSwitch.disarm();
  await rm(dir, { recursive: true, force: true });
});

const seen = (): string[] => faultSwitch.operations.map(({ kind, path }) => `${kind} ${path.replace(dir, "")}`);

describe("faultSwitch", () => {
  it("records what a Folder does under the real names", async () => {
    await using folder = await Folder.open(dir);
    faultSwitch.arm([dir]);
    await folder.makeFolder("100");
    await using guest = await folder.openFolder("100");
    await using file = await guest.createFile(".tmp-1");
    await file.write(Buffer.from("a"));
    await file.sync();
    await file.close();
    await guest.rename(".tmp-1", guest, "state.json");
    await guest.link("state.json", "copy");
    await guest.removeFile("copy");
    await guest.sync();
    await folder.remove("100");
    expect(seen()).toEqual([
      "mkdir /100",
      "create /100/.tmp-1",
      "write /100/.tmp-1",
      "sync /100/.tmp-1",
      "close /100/.tmp-1",
      "rename /100/state.json",
      "link /100/copy",
      "unlink /100/copy",
      "sync /100",
      "unlink /100/state.json",
      "rmdir /100",
    ]);
  });

  it("goes by the name that a folder has by then", async () => {
    await using folder = await Folder.open(dir);
    await folder.makeFolder("staging");
    await using staged = await folder.openFolder("staging");
    faultSwitch.arm([dir]);
    await rename(join(dir, "staging"), join(dir, "point"));
    await using file = await staged.createFile("a");
    await rename(join(dir, "point"), join(dir, "gone"));
    await file.sync();
    expect(seen()).toEqual(["rename /point", "create /point/a", "rename /gone", "sync /gone/a"]);
  });

  it("makes a call through a descriptor fail by its real name", async () => {
    await using folder = await Folder.open(dir);
    faultSwitch.arm([dir], { at: { name: `mkdir ${dir}/b`, occurrence: 1 }, errno: "EROFS", flavour: "before" });
    await expect(folder.makeFolder("a")).resolves.toBe(true);
    await expect(folder.makeFolder("b")).rejects.toThrow(`EROFS: injected, mkdir '${dir}/b'`);
  });

  it("does not watch a descriptor of a folder elsewhere", async () => {
    await using folder = await Folder.open(dir);
    faultSwitch.arm([`${dir}/other`]);
    await folder.makeFolder("otherwise");
    expect(seen()).toEqual([]);
  });
});

describe("onNamedCall()", () => {
  it("comes before looks and before each step of a removal", async () => {
    await using folder = await Folder.open(dir);
    await folder.makeFolder("100");
    const calls: string[] = [];
    faultSwitch.arm([dir]);
    onNamedCall(({ kind, paths }: NamedCall) => calls.push(`${kind} ${paths.join(" ").replaceAll(dir, "")}`));
    await folder.look("100");
    await folder.list();
    await (await folder.openFolder("100"))[Symbol.asyncDispose]();
    await folder.rename("100", folder, "101");
    await rm(join(dir, "101"), { recursive: true });
    onNamedCall(undefined);
    expect(calls).toEqual([
      ...["look /100", "list ", "read /100", "rename /100 /101"],
      ...["look /101", "list /101", "rmdir /101"],
    ]);
  });
});

describe("realPathOf()", () => {
  it("leaves other paths of /proc alone", () => {
    expect(realPathOf("/proc/self/fdinfo/1")).toBe("/proc/self/fdinfo/1");
    expect(realPathOf("/proc/self/fd")).toBe("/proc/self/fd");
  });

  it("names a closed descriptor by itself", () => {
    expect(realPathOf("/proc/self/fd/999999/a")).toBe("/proc/self/fd/999999/a");
  });

  it("does not show that a folder was deleted", async () => {
    await using folder = await Folder.open(dir);
    await folder.makeFolder("a");
    await using gone = await folder.openFolder("a");
    await folder.remove("a");
    onNamedCall(({ paths }) => expect(paths).toEqual([`${dir}/a/b`]));
    await expect(gone.look("b")).resolves.toBeUndefined();
  });
});
