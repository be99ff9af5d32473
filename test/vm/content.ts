// SPDX-License-Identifier: AGPL-3.0-or-later
// How a disk is looked at on both sides: on the host when its backup begins, in the test machine when it is restored.
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import type { ExpectedDisk } from "./protocol.ts";

/** Size and digest of all that a file or a block device gives until its end. */
export async function contentOf(file: string): Promise<Pick<ExpectedDisk, "sizeBytes" | "sha256">> {
  const digest = createHash("sha256");
  let sizeBytes = 0;
  for await (const bytes of createReadStream(file, { highWaterMark: 2 ** 20 })) {
    digest.update(bytes as Buffer);
    sizeBytes += (bytes as Buffer).length;
  }
  return { sizeBytes, sha256: digest.digest("hex") };
}
