// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { CleanupStack } from "../../../src/core/index.ts";
import { NbdConnectionError } from "../../../src/nbd/index.ts";
import { explainLoss } from "../../../src/source/source-failure.ts";

const SENTENCE =
  'Cannot back up "drive-scsi0": the QEMU process of VM 100 ended its NBD server during the backup (ECONNRESET)';

describe("explainLoss()", () => {
  const lost = new NbdConnectionError("Cannot talk to NBD server", { errno: "ECONNRESET" });

  it("names the VM whose NBD server is gone", () => {
    expect(explainLoss(100, "drive-scsi0", lost)).toMatchObject({ message: SENTENCE });
  });

  it("names it too where giving something back failed after that", async () => {
    const job = async (): Promise<void> => {
      await using stack = new CleanupStack();
      stack.defer(() => Promise.reject(new Error("close")));
      throw lost;
    };
    const error = await job().catch((thrown: unknown) => explainLoss(100, "drive-scsi0", thrown));
    expect(error).toMatchObject({ message: SENTENCE });
  });

  it("leaves other errors alone", () => {
    const other = new Error("other");
    expect(explainLoss(100, "drive-scsi0", other)).toBe(other);
  });
});
