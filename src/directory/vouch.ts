// SPDX-License-Identifier: AGPL-3.0-or-later
// What was on offer to a restore until its end, and what was not.
import { ChildProcessError } from "../core/index.ts";

/**
 * PVE's reader may have found something empty and have been content: an error when PVE gives back what it was offered is
 * the last thing that makes it call the restore failed.
 *
 * @throws ChildProcessError if the view of `what` is served no longer
 */
export async function mustVouch(
  what: string,
  view: { findTrouble(): Promise<string | undefined> } | undefined,
): Promise<void> {
  const trouble = await view?.findTrouble();
  if (trouble === undefined) return;
  throw new ChildProcessError(`Cannot vouch for the restored "${what}": it was not on offer to the end, ${trouble}`, {
    hint: "restore again",
  });
}
