// SPDX-License-Identifier: AGPL-3.0-or-later
// Whoever can write to the share can change a guest's config. Lines that run code on the node or reach for its devices
// when the guest starts are named in the restore's log.
import { beforeEach, describe, expect, it } from "vitest";
import { backUpContainer } from "../support/container/container-point.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { never, startGuest, VMID } from "../support/vm/vm-rules.ts";

const VOLNAME = "backup/100/qemu-1000";

/** Backs the VM up with these lines in its config, below those it has. */
async function backUpWith(node: TestNode, lines: readonly string[]): Promise<void> {
  await using guest = await startGuest(node);
  await using provider = node.provider();
  await provider.backup.backupInit(VMID, "qemu", 1000, never);
  await using access = await guest.openBackup();
  const config = Buffer.from(`${guest.guestConfig}${lines.map((line) => `${line}\n`).join("")}`);
  const info = { bandwidthLimit: 0, firewallConfig: undefined };
  await provider.backup.backupVm(VMID, config, access.vmVolumes(), info, never);
  await access.finish(true);
  await provider.backup.backupCleanup(VMID, "qemu", true, undefined, never);
}

/** Warnings of a restore that begins; that PVE reads the config alone must not give any. */
async function warningsOfVm(node: TestNode): Promise<string[]> {
  await using provider = node.provider();
  node.log.length = 0;
  await provider.restore.archiveGetGuestConfig(VOLNAME, never);
  expect(node.log).toEqual([]);
  await provider.restore.restoreVmInit(VOLNAME, never);
  await provider.restore.archiveGetGuestConfig(VOLNAME, never);
  await provider.restore.restoreVmCleanup(VOLNAME);
  return node.log.filter((line) => line.startsWith("warn: "));
}

/** One line that names the backup and every key; "lxc." stands for any that begins so. */
function expectOneWarning(warnings: readonly string[], volname: string, keys: readonly string[]): void {
  expect(warnings).toHaveLength(1);
  expect(warnings[0]).toMatch(/^warn: [^\n]+$/);
  expect(warnings[0]).toContain(volname);
  const named = warnings[0]?.replace(volname, "") ?? "";
  for (const key of keys) {
    expect(named).toMatch(new RegExp(`(?<![\\w.])${key.replace(".", "\\.\\S+")}(?![\\w.])`));
  }
}

const DANGEROUS_VM = [
  ["args", "args: -device vfio-pci,host=01:00.0"],
  ["hookscript", "hookscript: local:snippets/hook.pl"],
  ["hostpci0", "hostpci0: 0000:01:00.0,pcie=1"],
  ["usb0", "usb0: host=1234:5678"],
  ["serial0", "serial0: /dev/ttyS0"],
  ["scsi1", "scsi1: /dev/disk/by-id/ata-secret,backup=0,size=1G"],
  ["virtio2", "virtio2: file=/etc/shadow,backup=0,format=raw"],
] as const;

const HARMLESS_VM = [
  "#args: what a description says",
  "#hookscript: local:snippets/hook.pl",
  "usb1: spice,usb3=1",
  "serial1: socket",
  "ide2: none,media=cdrom",
  "scsi3: local-lvm:vm-100-disk-7,backup=0,size=1G",
  "net0: virtio=BC:24:11:00:00:01,bridge=vmbr0",
  "tags: args;hookscript",
];

const HARMLESS_CT = [
  "#lxc.apparmor.profile: unconfined",
  "hostname: ct",
  "rootfs: local-lvm:vm-101-disk-0,size=4G",
  "mp1: local-lvm:vm-101-disk-1,mp=/mnt/data,backup=1,size=4G",
  "net0: name=eth0,bridge=vmbr0,type=veth",
];

describe("the restore of a VM", () => {
  it("names every line of its config that runs code or reaches the host, in one warning", async () => {
    await using node = await TestNode.create();
    await backUpWith(node, [...HARMLESS_VM, ...DANGEROUS_VM.map(([, line]) => line)]);
    const warnings = await warningsOfVm(node);
    const keys = DANGEROUS_VM.map(([key]) => key);
    expectOneWarning(warnings, VOLNAME, keys);
    expect(warnings[0]).toMatch(/^warn: .*args.*hookscript/);
    expect(warnings[0]).not.toMatch(/usb1|serial1|ide2|scsi0|scsi3|net0|tags/);
  });

  it.each(DANGEROUS_VM)("names %s alone", async (key, line) => {
    await using node = await TestNode.create();
    await backUpWith(node, [line]);
    const warnings = await warningsOfVm(node);
    expectOneWarning(warnings, VOLNAME, [key]);
    for (const [other] of DANGEROUS_VM.filter(([one]) => one !== key)) {
      expect(warnings[0]?.replace(VOLNAME, "")).not.toMatch(new RegExp(`(?<!\\w)${other}(?!\\w)`));
    }
  });

  it("names what stands below a section, where vzdump writes nothing", async () => {
    await using node = await TestNode.create();
    await backUpWith(node, [...HARMLESS_VM, "", "[PENDING]", "args:-device x"]);
    expectOneWarning(await warningsOfVm(node), VOLNAME, ["args"]);
  });

  it("warns of nothing in a config like any other", async () => {
    await using node = await TestNode.create();
    await backUpWith(node, HARMLESS_VM);
    expect(await warningsOfVm(node)).toEqual([]);
  });
});

const DANGEROUS_CT = [
  ["lxc.", "lxc.mount.entry: /etc mnt/host none bind 0 0"],
  ["hookscript", "hookscript: local:snippets/hook.pl"],
  ["dev0", "dev0: /dev/dri/card0"],
  ["mp0", "mp0: /host/path,mp=/mnt/host"],
] as const;

async function warningsOfContainer(node: TestNode, lines: readonly string[]): Promise<[string, string[]]> {
  const guestConfig = lines.map((line) => `${line}\n`).join("");
  const volname = await backUpContainer(node, { epoch: 1000, format: "tar", guestConfig });
  await using provider = node.provider();
  node.log.length = 0;
  await provider.restore.archiveGetGuestConfig(volname, never);
  expect(node.log).toEqual([]);
  await provider.restore.restoreContainerInit(volname, never);
  await provider.restore.restoreContainerCleanup(volname);
  return [volname, node.log.filter((line) => line.startsWith("warn: "))];
}

describe("the restore of a container", () => {
  beforeEach((context) => requireTool(context, "tar"));

  it("names every line of its config that runs code or reaches the host, in one warning", async () => {
    await using node = await TestNode.create();
    const lines = [...HARMLESS_CT, ...DANGEROUS_CT.map(([, line]) => line), "lxc.apparmor.profile: unconfined"];
    const [volname, warnings] = await warningsOfContainer(node, lines);
    const named = DANGEROUS_CT.map(([key]) => key);
    expectOneWarning(warnings, volname, named);
    expect(warnings[0]).not.toMatch(/mp1|net0|rootfs|hostname/);
  });

  it.each(DANGEROUS_CT)("names %s alone", async (key, line) => {
    await using node = await TestNode.create();
    const [volname, warnings] = await warningsOfContainer(node, [...HARMLESS_CT, line]);
    expectOneWarning(warnings, volname, [key]);
  });

  it("warns of nothing in a config like any other", async () => {
    await using node = await TestNode.create();
    expect((await warningsOfContainer(node, HARMLESS_CT))[1]).toEqual([]);
  });
});
