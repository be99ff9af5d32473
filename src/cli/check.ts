// SPDX-License-Identifier: AGPL-3.0-or-later
// `pve-backup-host check`: finds out whether one backup can be restored, without restoring it.
import { formatBytes } from "../core/index.ts";
import { type Finding, verifyPoint } from "../maintenance/index.ts";
import type { Store } from "../store/index.ts";
import { print } from "./output.ts";

/** Prints what was checked, line by line. @throws as verifyPoint() and print() */
export async function check(store: Store, archive: string, signal: AbortSignal): Promise<void> {
  await verifyPoint(store, archive, signal, (finding) => print(`${describe(finding)}\n`, signal));
}

function describe(finding: Finding): string {
  switch (finding.kind) {
    case "chain": {
      const images = `${finding.images} image${finding.images === 1 ? "" : "s"}`;
      return `${finding.device}: ${formatBytes(finding.sizeBytes)}, ${images}`;
    }
    case "image":
      return `  ${finding.archive} ${finding.device}: ${checksum(finding.algorithm)}, tables are sound`;
    case "archive": {
      const listed = finding.members === undefined ? "" : `, all ${finding.members} members can be listed`;
      return `  ${finding.archive} ${finding.file}: ${checksum(finding.algorithm)}${listed}`;
    }
    case "whole":
      return `${finding.archive} can be restored${finding.isPrivileged ? AS_UNPRIVILEGED : ""}`;
  }
}

/** Proxmox VE refuses the backup of a privileged container as such, from any backup provider. */
const AS_UNPRIVILEGED = " as an unprivileged container: pct restore --unprivileged 1";

const checksum = (algorithm: string | undefined): string =>
  algorithm === undefined ? "no checksum is recorded" : `${algorithm} checksum matches`;
