// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { describeTellingKeys } from "../../../src/directory/config-warnings.ts";
import { findTellingKeys } from "../../../src/pve/guest-config.ts";

const keysOf = (type: "qemu" | "lxc", ...lines: string[]): string[] =>
  findTellingKeys(type, Buffer.from(lines.join("\n")));

describe("findTellingKeys()", () => {
  it.each([
    "args: -device x",
    "hookscript: local:snippets/x.sh",
    "hostpci0: 01:00.0",
    "usb1: host=1-2",
    "usb0: mapping=stick",
    "serial0: /dev/ttyS0",
    "parallel0: /dev/parport0",
    "rng0: source=/dev/hwrng",
    "virtiofs0: mapping-of-a-folder,cache=auto",
    "args:-device x",
    "args:\t-device x",
    "hookscript:local:snippets/x.sh",
    "hostpci0:mapping=x",
    "usb1:host=1-2",
    "usb1: spiceful",
    "serial0:/dev/ttyS0",
    "cdrom: /dev/sda",
    "scsi1: size=1G,file=/dev/sda",
    "scsi1: size=1G,/dev/sda",
    "scsi1: iothread=1, volume=/dev/sda",
    "scsi1: /dev/disk/by-id/x,size=1G",
    "virtio0: file=/dev/sda",
    "unused3: /dev/sdb",
  ])("names the key of %j in a VM's config", (line) => {
    expect(keysOf("qemu", "name: vm", line)).toEqual([line.split(":")[0]]);
  });

  it.each([
    "lxc.mount.entry: /etc etc none bind",
    "lxc.hook.pre-start = /bin/x",
    "hookscript: x",
    "dev0: /dev/kvm",
    "mp0: /srv,mp=/srv",
    "rootfs: /srv/ct",
    "hookscript:x",
    "dev0:/dev/kvm",
    "mp0:/srv,mp=/srv",
    "mp0: mp=/srv,volume=/srv",
  ])("names the key of %j in a container's config", (line) => {
    expect(keysOf("lxc", "hostname: ct", line)).toEqual([line.split(/\s*[:=]/)[0]]);
  });

  it("names nothing of an ordinary config", () => {
    expect(
      keysOf(
        "qemu",
        ...[
          "# args: in a comment",
          "scsi0: local-lvm:vm-100-disk-0,size=32G",
          "ide2: none,media=cdrom",
          "usb0: spice",
          "usb1:host=spice,usb3=1",
        ],
        ...[
          "scsi1: local:100/x.raw,serial=a/b",
          "serial0: socket",
          "net0: virtio=AA:BB:CC:DD:EE:FF,bridge=vmbr0",
          "description: args",
        ],
      ),
    ).toEqual([]);
    expect(
      keysOf("lxc", "rootfs: local-lvm:vm-101-disk-0,size=8G", "mp0: local-lvm:x,mp=/srv", "net0: name=eth0"),
    ).toEqual([]);
  });

  it("reads on below a section, and below what only looks like one", () => {
    expect(keysOf("qemu", "name: vm", "[PENDING]", "args: x")).toEqual(["args"]);
    expect(keysOf("qemu", "[", "hookscript: x")).toEqual(["hookscript"]);
  });

  it("names each key once, and survives bytes that are no text", () => {
    expect(findTellingKeys("qemu", Buffer.from("args: \xff\xfe\nargs: again\n", "latin1"))).toEqual(["args"]);
  });
});

describe("describeTellingKeys()", () => {
  it("makes one line for the log of a restore, or none", () => {
    expect(describeTellingKeys("backup/100/qemu-1", "qemu", Buffer.from("name: vm\n"))).toBeUndefined();
    expect(describeTellingKeys("backup/100/qemu-1", "qemu", Buffer.from("args: x\nhookscript: y\n"))).toMatch(
      /^The config of "backup\/100\/qemu-1" reaches the host when the guest starts: args, hookscript; anyone who can write/,
    );
  });
});
