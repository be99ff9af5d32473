// SPDX-License-Identifier: AGPL-3.0-or-later
// Lines of a guest's config that run programs or reach the host when the guest starts. Whoever can write to the share
// can put them into a backup, so a restore names them.
import type { GuestType } from "./backup-provider.ts";

const DISK_KEY = "(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\\d+";

/** What makes a line worth a look: its key, and for some its value. */
const TELLING: Readonly<Record<GuestType, readonly RegExp[]>> = {
  qemu: [
    /^(args|hookscript|ivshmem): /,
    /^(hostpci\d+|parallel\d+): /,
    /^(usb\d+): (?!spice)/,
    /^(serial\d+): \/dev\//,
    /^(rng\d+): /,
    new RegExp(`^(${DISK_KEY}|virtiofs\\d+): (?:file=)?/`),
  ],
  lxc: [/^(lxc\.[\w.-]+)\s*[:=]/, /^(hookscript): /, /^(dev\d+): /, /^(mp\d+|rootfs): (?:volume=)?\//],
};

/** Keys of such lines above the first `[section]`: below are snapshots, which a restore drops. In order, each once. */
export function findTellingKeys(type: GuestType, config: Buffer): string[] {
  const keys = new Set<string>();
  for (const line of config.toString("latin1").split("\n")) {
    if (line.startsWith("[")) break;
    for (const pattern of TELLING[type]) {
      const key = pattern.exec(line)?.[1];
      if (key !== undefined) keys.add(key);
    }
  }
  return [...keys];
}

/** The line for the restore's log; undefined for a config without such lines. */
export function describeTellingKeys(volname: string, type: GuestType, config: Buffer): string | undefined {
  const keys = findTellingKeys(type, config);
  if (keys.length === 0) return undefined;
  const what = `The config of "${volname}" reaches the host when the guest starts: ${keys.join(", ")}`;
  return `${what}; whoever can write to the storage can have put that there, so look at it before you start the guest`;
}
