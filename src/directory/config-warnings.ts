// SPDX-License-Identifier: AGPL-3.0-or-later
// Lines of a guest's config that run programs or reach the host when the guest starts. Anyone who can write to the
// share can put them into a backup, so a restore names them.

import type { GuestType } from "../provider/index.ts";
import { findTellingKeys } from "../pve/index.ts";

/** The line for the restore's log; undefined for a config without such lines. */
export function describeTellingKeys(volname: string, type: GuestType, config: Buffer): string | undefined {
  const keys = findTellingKeys(type, config);
  if (keys.length === 0) return undefined;
  const what = `The config of "${volname}" reaches the host when the guest starts: ${keys.join(", ")}`;
  return `${what}; anyone who can write to the storage could have added that, so review it before you start the guest`;
}
