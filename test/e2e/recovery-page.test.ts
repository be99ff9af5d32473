// SPDX-License-Identifier: AGPL-3.0-or-later
// docs/recovery.md, word for word: its commands bring back, from a store that this software wrote, what a copy taken at
// the time of the backup holds. Proxmox VE's pvesm and qm are played; everything else is the system's own.
import { chmod, copyFile, mkdir, readFile, rename, rm, stat, truncate, writeFile } from "node:fs/promises";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it, type TestContext } from "vitest";
import { compareRaw, runTool, seededBytes } from "../../fixtures/lab/index.ts";
import { backUpContainer, type ContainerFormat, CT_VMID } from "../support/container/container-point.ts";
import { PageCommands, runShell } from "../support/docs/page-commands.ts";
import { TestNode } from "../support/node/test-node.ts";
import { hasTool, requireTool } from "../support/programs/tools.ts";
import { DISK, DISK_BYTES, MIB, mustBackUp, type SafeBackup, startGuest } from "../support/vm/vm-rules.ts";

const PAGE = "docs/recovery.md";
const TOOLS = ["jq", "lxc-usernsexec", "mkfs.ext4", "losetup", "qemu-img", "unshare", "xxhsum", "zstd"];
const IS_ROOT = process.getuid?.() === 0;
const EFI = "drive-efidisk0";
const TPM = "drive-tpmstate0-backup";
const VM = "A virtual machine on Proxmox VE";
const CT = "A container on Proxmox VE";
const NEWEST = 2000;
const NOTE = "what the guest wrote before its first backup\n";

/** `pvesm alloc` makes sparse files, `pvesm path` names them, `qm create` writes an empty config. */
const PVESM = `#!/bin/bash
set -eu
case $1 in
  alloc)
    n=0; while [ -e "$VOLUMES/vm-$3-disk-$n" ]; do n=$((n + 1)); done
    case $5 in *G) size=$5 ;; *) size=\${5}K ;; esac
    truncate -s "$size" "$VOLUMES/vm-$3-disk-$n"
    echo "successfully created '$2:vm-$3-disk-$n'" ;;
  path) echo "$VOLUMES/\${2#*:}" ;;
esac
`;
const QM = `#!/bin/bash
set -eu
case $1 in
  create) ( set -C; : > "$ETC/qemu-server/$2.conf" ) ;;
  config) cat "$ETC/qemu-server/$2.conf" ;;
esac
`;

let node: TestNode;
let backup: SafeBackup;
const commands = new PageCommands(PAGE, "sh");
const used = new Set<string>();

const etc = (): string => path.join(node.dir, "pve");
const volumes = (): string => path.join(node.dir, "volumes");

/** Mounts and user namespaces are root's. */
function requireNode(context: TestContext): void {
  requireTool(context, ...TOOLS);
  if (!IS_ROOT) context.skip("needs root");
}

/** The page's variables with the values of this test, as an administrator sets them. */
function variables(vmid: number, point: string): string {
  return [`STORE='${node.storePath}'`, `VMID=${vmid}`, `POINT=${point}`].join("\n");
}

/** Runs sections of the page one after the other in one shell. */
async function follow(sections: readonly string[], set: string, more = ""): Promise<string> {
  const text = sections.flatMap((section) => {
    used.add(section);
    return commands.blocks(section);
  });
  return await runPage([set, ...text, more].join("\n"));
}

async function runPage(text: string): Promise<string> {
  const exports = `export VOLUMES='${volumes()}' ETC='${etc()}'`;
  const shell = { binDir: path.join(node.dir, "bin"), cwd: node.dir, idMapFile: path.join(node.dir, "ids") };
  return await runShell(`${exports}\n${text.replaceAll("/etc/pve/", `${etc()}/`)}`, shell);
}

/** An ext4 file system as it is while it is mounted: with a journal that was not replayed. */
async function makeLiveFileSystem(image: string): Promise<void> {
  const mountPoint = `${image}.mounted`;
  await mkdir(mountPoint);
  await writeFile(image, "");
  await truncate(image, DISK_BYTES);
  await runTool("mkfs.ext4", ["-q", image]);
  await writeFile(`${image}.photo`, seededBytes("photo", 4 * MIB));
  const script =
    'mount -o loop "$1" "$2"; printf "%s" "$3" > "$2/note.txt"; cp "$1.photo" "$2/photo.jpg"; sync; cp "$1" "$1.live"; umount "$2"';
  await runTool("unshare", ["--mount", "bash", "-ec", script, "bash", image, mountPoint, NOTE]);
  await rename(`${image}.live`, image);
}

beforeAll(async () => {
  node = await TestNode.create();
  if (!IS_ROOT || !TOOLS.every(hasTool)) return; // every test says so
  await mkdir(path.join(node.dir, "bin"));
  await mkdir(volumes());
  for (const folder of ["qemu-server", "lxc", "firewall"]) await mkdir(path.join(etc(), folder), { recursive: true });
  for (const [name, program] of [
    ["pvesm", PVESM],
    ["qm", QM],
  ] as const) {
    await writeFile(path.join(node.dir, "bin", name), program);
    await chmod(path.join(node.dir, "bin", name), 0o755);
  }
  await writeFile(path.join(node.dir, "ids"), "root:100000:65536\n");
  await chmod(node.dir, 0o711); // for the container's root
  const image = path.join(node.dir, "fs.img");
  await makeLiveFileSystem(image);
  const disks = [
    { device: DISK, sizeBytes: DISK_BYTES },
    { device: EFI, sizeBytes: 540_672 },
    { device: TPM, sizeBytes: 4 * MIB },
  ];
  await using guest = await startGuest(node, { disks });
  const content = await readFile(image);
  for (let at = 0; at < content.byteLength; at += MIB) await guest.write(DISK, at, content.subarray(at, at + MIB));
  await guest.write(EFI, 4096, seededBytes("efi", 8192));
  await guest.write(TPM, 0, seededBytes("tpm", 8192));
  await mustBackUp(node, guest, { epoch: 1000 });
  await guest.write(DISK, 20 * MIB, seededBytes("later", MIB));
  backup = await mustBackUp(node, guest, { epoch: NEWEST, firewallConfig: Buffer.from("[OPTIONS]\nenable: 1\n") });
});

afterAll(async () => {
  await node[Symbol.asyncDispose]();
});

const oracle = (device = DISK): string => backup.oracles.get(device) ?? "no such oracle";
const vmPoint = `qemu-${NEWEST}`;
const identical = expect.objectContaining({ identical: true });

describe("docs/recovery.md", () => {
  it("lists the backups, shows the chain, and finds every file whole", async (context) => {
    requireNode(context);
    const checked = await follow(["Check a backup"], variables(100, vmPoint));
    expect(checked.match(/^ok {7}/gm)).toHaveLength(6); // three disks in two backups
    expect(checked).not.toContain("DAMAGED");
    const [set = "", ...rest] = commands.blocks("Choose the backup"); // the first block sets the variables
    used.add("Choose the backup");
    const chosen = await runPage([set, variables(100, vmPoint), ...rest].join("\n"));
    expect(chosen).toMatch(/^qemu-1000 {2}1970-01-01/m);
    expect(chosen).toMatch(/^image: .*drive-scsi0.qcow2$/m);
    expect(chosen).toMatch(/^backing file: \.\.\/qemu-1000\/drive-scsi0.qcow2/m);
  });

  it("names a truncated image, which qemu-img converts without a word", async (context) => {
    requireNode(context);
    const image = path.join(node.storePath, "100/qemu-1000", `${DISK}.qcow2`);
    await copyFile(image, `${node.dir}/whole`);
    try {
      await truncate(image, (await stat(image)).size - MIB);
      await runTool("qemu-img", ["convert", "-O", "raw", image, `${node.dir}/silently.raw`]);
      const lost = await compareRaw(`${node.dir}/silently.raw`, `${node.dir}/oracle-1000/${DISK}.raw`);
      expect(lost.identical).toBe(false);
      expect(await follow(["Check a backup"], variables(100, vmPoint))).toMatch(
        /^DAMAGED {2}.*qemu-1000\/drive-scsi0.qcow2$/m,
      );
    } finally {
      await copyFile(`${node.dir}/whole`, image);
    }
  });

  it("brings a virtual machine back with all its disks, its configuration and its firewall", async (context) => {
    requireNode(context);
    await follow([VM], variables(100, vmPoint));
    for (const [index, device] of [DISK, EFI, TPM].entries()) {
      expect(await compareRaw(path.join(volumes(), `vm-100-disk-${index}`), oracle(device)), device).toEqual(identical);
    }
    const config = await readFile(path.join(etc(), "qemu-server/100.conf"), "utf8");
    expect(config).not.toContain("#qmdump#");
    expect(config).toMatch(/^scsi0: local-lvm:vm-100-disk-0,size=24576K$/m);
    expect(config).toMatch(/^efidisk0: local-lvm:vm-100-disk-1,size=528K$/m);
    expect(await readFile(path.join(etc(), "firewall/100.fw"), "utf8")).toContain("enable: 1");
    await expect(follow([VM], variables(100, vmPoint))).rejects.toThrow("cannot overwrite existing file"); // step 1
  });

  it("converts a disk, and mounts what a running VM left on it", async (context) => {
    requireNode(context);
    const convert = commands.blocks("A disk anywhere else");
    const look = commands.blocks("Files from a disk").join("\n");
    const withoutNoload = look.replace(/^(mount -o ro),noload(.*)$/m, '$1$2 || { losetup -d "$loop"; exit 3; }');
    expect(withoutNoload).not.toBe(look);
    const plain = [variables(100, vmPoint), ...convert, withoutNoload].join("\n");
    await expect(runPage(plain)).rejects.toThrow("read-only"); // as the page warns
    const out = await follow(
      ["A disk anywhere else", "Files from a disk"],
      variables(100, vmPoint),
      `cp "$WORK/disk.raw" '${node.dir}/converted.raw'`,
    );
    expect(out).toContain("note.txt");
    expect(await compareRaw(`${node.dir}/converted.raw`, oracle())).toEqual(identical);
  });

  it.for(["tar", "tar.zst", "sqfs"] as const)("brings a container back from %s", async (format, context) => {
    requireNode(context);
    await expectContainer(format);
  });

  it("takes a backup elsewhere, and reads a chain by hand", async (context) => {
    requireNode(context);
    const keep = `mv "$COPY" '${node.dir}/copy'`;
    await follow(["A moved or partly copied store"], variables(100, vmPoint), `cd /; ${keep}`);
    const copy = path.join(node.dir, "copy");
    for (const name of ["flat/disk.raw", "flat/disk-2.raw"]) {
      expect(await compareRaw(path.join(copy, name), oracle()), name).toEqual(identical);
    }
    const moved = path.join(copy, vmPoint, `${DISK}.qcow2`);
    await runTool("qemu-img", ["convert", "-O", "raw", moved, `${copy}/moved.raw`]);
    expect(await compareRaw(`${copy}/moved.raw`, oracle())).toEqual(identical);
  });

  it("saves what changed since a base that is gone", async (context) => {
    requireNode(context);
    const base = path.join(node.storePath, "100/qemu-1000");
    await rename(base, `${node.dir}/away`);
    try {
      const keep = `mv "$LEFT/disk.raw" '${node.dir}/left.raw'`;
      await follow(["A damaged or missing base"], variables(100, vmPoint), keep);
    } finally {
      await rename(`${node.dir}/away`, base);
    }
    const left = await readFile(`${node.dir}/left.raw`);
    expect(left.byteLength).toBe(DISK_BYTES);
    expect(left.subarray(20 * MIB, 21 * MIB).equals(seededBytes("later", MIB))).toBe(true);
    expect(left.subarray(0, 4 * MIB).every((byte) => byte === 0)).toBe(true);
  });

  it("has no section with commands that no test here runs", (context) => {
    requireNode(context);
    expect(commands.sections.filter((section) => !used.has(section))).toEqual([]);
  });
});

async function expectContainer(format: ContainerFormat): Promise<void> {
  const epoch = { tar: 11, "tar.zst": 12, sqfs: 13 }[format];
  const guestConfig = "arch: amd64\nhostname: web\nrootfs: local-lvm:vm-101-disk-0,size=4G\n";
  const point = (await backUpContainer(node, { epoch, format, guestConfig })).split("/").at(-1) ?? "";
  used.add(CT);
  const [create = "", extract = "", configure = ""] = commands.blocks(CT);
  const [fromSquashfs = ""] = new PageCommands(PAGE, "sh-squashfs").blocks(CT);
  const target = path.join(node.dir, `back-${format}`);
  await rm(path.join(volumes(), "vm-101-disk-0"), { force: true });
  const keep = `tar -C "$WORK/root" --exclude=./lost+found -cf '${target}.tar' --numeric-owner .`;
  const text = [variables(CT_VMID, point), create, format === "sqfs" ? fromSquashfs : extract, keep, configure];
  await runPage(text.join("\n"));
  await mkdir(target);
  await runTool("tar", ["-C", target, "--same-owner", "-xf", `${target}.tar`]);
  expect(await runTool("diff", ["-r", target, path.join(node.dir, `tree-${epoch}`)])).toBe("");
  expect((await stat(path.join(target, "sbin/init"))).uid).toBe(100_000);
  const config = await readFile(path.join(etc(), "lxc/101.conf"), "utf8");
  expect(config).toMatch(/^rootfs: local-lvm:vm-101-disk-0,size=4G$/m);
  expect(config).toMatch(/^unprivileged: 1$/m);
}
