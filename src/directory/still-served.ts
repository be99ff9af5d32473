// SPDX-License-Identifier: AGPL-3.0-or-later
// Whether what a restore read was served until its end.
import { ChildProcessError } from "../core/index.ts";

/**
 * PVE's reader may have read an empty disk and reported success: an error when PVE gives back what it was offered is
 * the last chance to make the restore fail.
 *
 * @throws ChildProcessError if the view of `what` is no longer served
 */
export async function assertStillServed(
  what: string,
  view: { findTrouble(): Promise<string | undefined> } | undefined,
): Promise<void> {
  const trouble = await view?.findTrouble();
  if (trouble === undefined) return;
  throw new ChildProcessError(`Cannot verify the restored "${what}": it was not served to the end, ${trouble}`, {
    hint: "restore again",
  });
}
