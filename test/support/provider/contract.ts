// SPDX-License-Identifier: AGPL-3.0-or-later
// What src/provider promises about every provider, tested through the shim under perl -T. The oracles are the guest's
// own disk and the text of the contract: nothing in here knows where a provider stores what.
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type LabGuest, runTool, seededBytes } from "../../../fixtures/lab/index.ts";
import { TestNode } from "../node/test-node.ts";
import { type Bundle, buildProgram } from "../programs/bundle.ts";
import { DISK, MIB, startGuest, VMID } from "../vm/vm-rules.ts";
import { PerlCalls } from "./perl-calls.ts";

interface ProviderSubject {
  readonly name: string;
  /** The composition root, below the project's root. */
  readonly entryPoint: string;
  /** Directory of the provider's own Perl modules, below the project's root. */
  readonly perlDirs: readonly string[];
  /** The storage's section without its path. */
  readonly scfg: Readonly<Record<string, unknown>>;
  /** Everything else must be refused as unsupported. */
  readonly supports: { readonly incremental: boolean; readonly containers: boolean; readonly removal: boolean };
}

interface Entry {
  readonly volid: string;
  readonly vmid: number;
  readonly subtype: string;
  readonly ctime: number;
  readonly size: number;
  readonly format: string;
  readonly content: string;
  readonly notes?: string;
  readonly protected?: number;
  readonly parent?: string;
}

/** What PVE appends, and what a backup must keep byte for byte. */
const COMMENT = "#zwei \u00e4\n";
const FIREWALL = "[OPTIONS]\nenable: 1\n";
const CT = 101;
const TIMEOUT = { timeout: 180_000 };

export function describeProvider({ name, entryPoint, perlDirs, scfg, supports }: ProviderSubject): void {
  describe(`the provider "${name}"`, TIMEOUT, () => {
    let bundle: Bundle;
    let node: TestNode;
    let guest: LabGuest;
    let perl: PerlCalls;
    let epoch = 1_700_000_000;
    const made: { volname: string; oracle: Buffer }[] = [];

    beforeAll(async () => {
      bundle = await buildProgram(entryPoint);
      node = await TestNode.create();
      guest = await startGuest(node);
      await guest.write(DISK, 3 * MIB, seededBytes("first", MIB));
      perl = await start();
    });
    afterAll(async () => {
      await perl?.[Symbol.asyncDispose]();
      await guest?.[Symbol.asyncDispose]();
      await node?.[Symbol.asyncDispose]();
      await bundle?.[Symbol.asyncDispose]();
    });

    const start = async (): Promise<PerlCalls> => {
      const { dir, root, storeid } = node;
      const section = { path: node.storePath, content: "backup", ...scfg };
      return await PerlCalls.start({ dir, root, bridge: bundle.path, perlDirs, storeid, scfg: section });
    };
    const volid = (volname: string): string => `${node.storeid}:${volname}`;
    const list = async (): Promise<Entry[]> => await perl.storage("volume_list", node.storeid, null, "backup");
    const file = async (content: string): Promise<{ file: string }> => {
      const made = path.join(await mkdtemp(path.join(node.dir, "file-")), "content");
      await writeFile(made, content);
      return { file: made };
    };

    /** One guest of a job up to the end of backup_vm; the caller ends the job. */
    async function backUp(): Promise<{ volname: string; mode: string | undefined }> {
      epoch += 60;
      await perl.hook("job_init", epoch);
      const { "archive-name": archive } = await perl.hook<{ "archive-name": string }>(
        ...(["backup_init", VMID, "qemu", epoch] as const),
      );
      expect(archive).toMatch(/^[A-Za-z0-9.+=_/:-]+$/);
      expect(["nbd", "file-handle"]).toContain(await perl.hook("backup_get_mechanism", VMID, "qemu"));
      const sizes = Object.fromEntries(guest.devices);
      const modes = await perl.hook<Record<string, "new" | "use">>("backup_vm_query_incremental", VMID, sizes);
      const oracleDir = await mkdtemp(path.join(node.dir, "oracle-"));
      await using access = await guest.openBackup({ modes, oracleDir });
      const info = { "firewall-config": FIREWALL };
      await perl.hook("backup_vm", VMID, await file(guest.guestConfig + COMMENT), access.volumes, {
        ...info,
        "bandwidth-limit": 0,
      });
      await access.finish(true);
      const oracle = await readFile(access.oracles.get(DISK) ?? "");
      made.push({ volname: `backup/${archive}`, oracle });
      return { volname: `backup/${archive}`, mode: modes[DISK] };
    }

    async function endJob(success: boolean): Promise<number> {
      const info = success ? {} : { error: "it failed\n" };
      const { stats } = await perl.hook<{ stats: { "archive-size": number } }>(
        ...(["backup_cleanup", VMID, "qemu", success ? 1 : 0, info] as const),
      );
      await perl.hook("job_cleanup");
      return stats["archive-size"];
    }

    async function restored(volname: string): Promise<Buffer> {
      const out = path.join(await mkdtemp(path.join(node.dir, "restore-")), "disk.raw");
      expect(await perl.hookList("restore_get_mechanism", volname)).toEqual(["qemu-img", "qemu"]);
      const sizes = await perl.hook<Record<string, { size: number }>>("restore_vm_init", volname);
      expect(sizes).toEqual(Object.fromEntries(guest.devices));
      const offer = await perl.hook<{ "qemu-img-path": string }>("restore_vm_volume_init", volname, DISK, {});
      await runTool("qemu-img", ["convert", "-f", "raw", "-O", "raw", offer["qemu-img-path"], out]);
      await perl.hook("restore_vm_volume_cleanup", volname, DISK, {});
      await perl.hook("restore_vm_cleanup", volname);
      await perl.hook("restore_vm_cleanup", volname);
      const bytes = await readFile(out);
      await rm(out);
      return bytes;
    }

    it("makes a backup that is listed as soon as backup_vm has answered, and says its size", async () => {
      const { volname } = await backUp();
      const [entry, ...more] = await list();
      expect(more).toEqual([]);
      expect(entry).toMatchObject({ volid: volid(volname), vmid: VMID, subtype: "qemu", ctime: epoch });
      expect(entry?.content).toBe("backup");
      expect(entry?.size).toBeGreaterThan(0);
      expect(await endJob(true)).toBeGreaterThan(0);
      const info = await perl.storageList<[number, string, number, string | null]>("volume_size_info", volid(volname));
      expect(info).toEqual([expect.any(Number), entry?.format, expect.any(Number), null]);
      expect(info[0]).toBeGreaterThan(0);
    });

    it("gives it back bit for bit, with both configurations", async () => {
      const [{ volname, oracle }] = made as [{ volname: string; oracle: Buffer }];
      expect((await restored(volname)).equals(oracle)).toBe(true);
      expect(await perl.hook("archive_get_guest_config", volname)).toBe(guest.guestConfig + COMMENT);
      expect(await perl.hook("archive_get_firewall_config", volname)).toBe(FIREWALL);
    });

    it("keeps what is complete when the job fails afterwards, and takes two cleanups of each kind", async () => {
      await guest.write(DISK, 5 * MIB, seededBytes("second", MIB));
      const { volname, mode } = await backUp();
      if (!supports.incremental) expect(mode).toBeUndefined();
      await endJob(false);
      await endJob(false);
      expect((await list()).map((entry) => entry.volid)).toContain(volid(volname));
      expect((await restored(volname)).equals(made.at(-1)?.oracle ?? Buffer.alloc(0))).toBe(true);
    });

    it("takes a failure without a backup_init, and leaves nothing of a backup that never was", async () => {
      const before = await list();
      await perl.hook("backup_cleanup", 999, null, 0, { error: "no such guest\n" });
      await perl.hook("backup_init", VMID, "qemu", epoch + 1);
      await endJob(false);
      expect(await list()).toEqual(before);
      await perl.hook("backup_init", VMID, "qemu", epoch + 1);
      await expect(endJob(true)).rejects.toThrow(/^Cannot /); // nothing was backed up
      await endJob(false);
      expect(await list()).toEqual(before);
    });

    it.runIf(supports.incremental)("backs up only the changes, and names what they build on", async () => {
      await backUp();
      await endJob(true);
      await guest.write(DISK, 9 * MIB, seededBytes("third", MIB));
      const { volname, mode } = await backUp();
      await endJob(true);
      expect(mode).toBe("use");
      const base = made.at(-2)?.volname ?? "";
      expect((await list()).find((entry) => entry.volid === volid(volname))?.parent).toBe(volid(base));
      expect((await perl.storageList<unknown[]>("volume_size_info", volid(volname)))[3]).toBe(base);
      expect((await restored(volname)).equals(made.at(-1)?.oracle ?? Buffer.alloc(0))).toBe(true);
    });

    it("keeps notes and protection, and knows no other attribute", async () => {
      const volname = made[0]?.volname ?? "";
      const get = (attribute: string) => perl.storage("get_volume_attribute", volid(volname), attribute);
      const set = (attribute: string, value: unknown) =>
        perl.storage("update_volume_attribute", volid(volname), attribute, value);
      expect([await get("notes"), Number(await get("protected")), await get("color")]).toEqual(["", 0, null]);
      await set("notes", "of the first\nday");
      await set("protected", 1);
      expect([await get("notes"), Number(await get("protected"))]).toEqual(["of the first\nday", 1]);
      const entry = (await list()).find((one) => one.volid === volid(volname));
      expect(entry).toMatchObject({ notes: "of the first\nday", protected: 1 });
      await set("protected", 0);
      expect(Number(await get("protected"))).toBe(0);
      await expect(set("color", "red")).rejects.toThrow(/^Cannot set .*"color"/);
    });

    it("marks by PVE's rules, for a dry run; and removes what is marked so, or says that it cannot", async () => {
      const [first, ...others] = made.map(({ volname }) => volid(volname));
      await perl.storage("update_volume_attribute", first, "protected", 1);
      const prune = async (keep: object, dryrun: number): Promise<Record<string, string>> => {
        const marked = await perl.storage<{ volid: string; mark: string }[]>(
          ...(["prune_backups", node.storeid, keep, VMID, "qemu", dryrun] as const),
        );
        return Object.fromEntries(marked.map(({ volid: id, mark }) => [id, mark]));
      };
      const all = (mark: string) => Object.fromEntries(others.map((id) => [id, mark]));
      const newest = others.at(-1) ?? "";
      expect(await prune({}, 1)).toEqual({ [first ?? ""]: "protected", ...all("keep") });
      expect(await prune({ "keep-all": 1, "keep-last": 1 }, 0)).toEqual({ [first ?? ""]: "protected", ...all("keep") });
      // All of them are from one day: the newest one stays.
      const daily = { [first ?? ""]: "protected", ...all("remove"), [newest]: "keep" };
      expect(await prune({ "keep-last": 1, "keep-yearly": 5 }, 1)).toEqual(daily);
      expect(await perl.storage("prune_backups", node.storeid, { "keep-last": 1 }, 4711, "qemu", 1)).toEqual([]);
      expect(await perl.storage("prune_backups", node.storeid, { "keep-last": 1 }, VMID, "lxc", 1)).toEqual([]);
      const before = (await list()).length;
      await perl.storage("update_volume_attribute", newest, "protected", 1);
      const another = await backUp();
      await endJob(true);
      if (supports.removal) {
        await perl.storage("vdisk_free", volid(another.volname));
        expect((await list()).length).toBe(before);
      } else {
        await expect(perl.storage("vdisk_free", volid(another.volname))).rejects.toThrow(/^Cannot remove /);
        if (others.length > 1) await expect(prune({ "keep-last": 1 }, 0)).rejects.toThrow(/^Cannot prune /);
        expect((await list()).length).toBe(before + 1);
      }
    });

    it("refuses names that are not those of a backup, and those of none", async () => {
      const volname = made[0]?.volname ?? "";
      const unknown = volname.replace(/[0-9]+$/, "1");
      for (const wrong of [unknown, "backup/../../etc/passwd", "backup/x", `${volname}/`, `${volname} `]) {
        await expect(perl.hook("restore_get_mechanism", wrong)).rejects.toThrow(/^Cannot /);
        await expect(perl.hook("archive_get_guest_config", wrong)).rejects.toThrow(/^Cannot /);
        await expect(perl.storageList("volume_size_info", `${node.storeid}:${wrong}`)).rejects.toThrow();
        await expect(perl.storage("update_volume_attribute", volid(wrong), "notes", "x")).rejects.toThrow();
      }
    });

    it("never dies of a log file", async () => {
      const before = (await list()).length;
      expect(await perl.hook("backup_handle_log_file", VMID, "/nonexistent/x.log")).toBeNull();
      expect(await perl.hook("backup_handle_log_file", 4711, "/nonexistent/x.log")).toBeNull();
      await perl.hook("backup_handle_log_file", VMID, (await file("INFO: done\n")).file);
      expect((await list()).length).toBe(before);
    });

    it("backs up containers through handles that the host opens, or says that it does not", async () => {
      const tree = path.join(node.dir, "ct");
      for (const folder of ["sbin", "bin", "etc", "usr", "var", "home", "root", "tmp", "opt", "srv", "mnt"]) {
        await mkdir(path.join(tree, folder), { recursive: true });
      }
      await writeFile(path.join(tree, "etc/hostname"), "ct\n");
      const info = { directory: tree, sources: ["./"], "backup-user-id": 0 };
      await perl.hook("job_init", ++epoch);
      if (!supports.containers) {
        await expect(perl.hook("backup_init", CT, "lxc", epoch)).rejects.toThrow(/^Cannot .*not support/);
        await expect(perl.hook("backup_container_prepare", CT, info)).rejects.toThrow(/^Cannot .*not support/);
        return;
      }
      const { "archive-name": archive } = await perl.hook<{ "archive-name": string }>("backup_init", CT, "lxc", epoch);
      expect(await perl.hook("backup_get_mechanism", CT, "lxc")).toBe("directory");
      await perl.hook("backup_container_prepare", CT, info);
      expect(await perl.hookList("backup_container", CT, await file("hostname: ct\n"), [], info)).toEqual([]);
      await perl.hook("backup_cleanup", CT, "lxc", 1, {});
      const volname = `backup/${archive}`;
      const offer = await perl.hook<Record<string, string>>("restore_container_init", volname, node.storeid, {});
      const target = await mkdtemp(path.join(node.dir, "ct-"));
      if (offer["tar-path"] !== undefined) await runTool("tar", ["xf", offer["tar-path"], "-C", target]);
      else await runTool("cp", ["-a", `${offer["archive-directory"]}/.`, target]);
      await perl.hook("restore_container_cleanup", volname, node.storeid, {});
      expect(await readFile(path.join(target, "etc/hostname"), "utf8")).toBe("ct\n");
      expect(await perl.hook("archive_get_guest_config", volname, node.storeid)).toBe("hostname: ct\n");
    });

    it("prints nothing but log lines of its own", () => {
      expect(perl.log.filter((line) => line.startsWith("perl:"))).toEqual([]);
    });
  });
}
