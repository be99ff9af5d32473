// SPDX-License-Identifier: AGPL-3.0-or-later
import { mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { resolveBackupName } from "../../../src/cli/backup-name.ts";

const archive = "100/qemu-1763802000";
let dir: string;
let store: string;

beforeAll(async () => {
  dir = await mkdtemp(path.join(os.tmpdir(), "pbh-name-"));
  store = path.join(dir, "store");
  await mkdir(path.join(store, archive), { recursive: true });
  await symlink(store, path.join(dir, "link"));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

describe("resolveBackupName()", () => {
  it.each([archive, `${archive}/`, `backup/${archive}`, `backup:backup/${archive}`, `my-Store.1:backup/${archive}`])(
    "takes %s",
    async (name) => {
      expect(await resolveBackupName(name, store)).toBe(archive);
    },
  );

  it("takes the path of the backup's directory, relative, absolute, or through a link", async () => {
    const relative = `./${path.relative(process.cwd(), path.join(store, archive))}`;
    for (const name of [path.join(store, archive), `${path.join(store, archive)}/`, relative, relative.slice(2)]) {
      expect(await resolveBackupName(name, store)).toBe(archive);
    }
    expect(await resolveBackupName(path.join(dir, "link", archive), store)).toBe(archive);
    expect(await resolveBackupName(path.join(store, archive), path.join(dir, "link"))).toBe(archive);
  });

  it("takes the path of a backup that does not exist: the store says so", async () => {
    expect(await resolveBackupName(path.join(store, "100/qemu-1"), store)).toBe("100/qemu-1");
  });

  it.each(["", "100", "100/qemu-01", "100/vzdump-qemu-1.vma", "x/100/qemu-1", "local:iso/x.iso", "../100/qemu-1", "/"])(
    "refuses %j",
    async (name) => {
      await expect(resolveBackupName(name, store)).rejects.toMatchObject({ code: "INVALID_PARAMS" });
    },
  );
});
