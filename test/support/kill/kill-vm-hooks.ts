// SPDX-License-Identifier: AGPL-3.0-or-later
// One bridge bundle for all tests of a file or a block, and a separate VM stage for each of them.
import { afterAll, beforeAll, beforeEach } from "vitest";
import { type BridgeBundle, buildBridge } from "../bridge/bridge-process.ts";
import { requireTool } from "../programs/tools.ts";
import { type StageOptions, VmStage } from "./kill-vm-stage.ts";

interface StagedTests {
  readonly bundle: BridgeBundle;
  /** The stage of the running test. */
  readonly stage: VmStage;
}

/** Registers the hooks. @param prepare what each stage needs in addition to one full backup */
export function stagePerTest(
  options: StageOptions = {},
  prepare: (stage: VmStage) => Promise<void> = async () => undefined,
): StagedTests {
  let bundle: BridgeBundle;
  let stage: VmStage;
  beforeAll(async () => {
    bundle = await buildBridge();
  });
  afterAll(() => bundle[Symbol.asyncDispose]());
  beforeEach(async (context) => {
    requireTool(context, "qemu-storage-daemon", "qemu-img", "perl", "setpriv");
    if (options.mechanism === "file-handle") requireTool(context, "nbdfuse", "nbdinfo", "fusermount3");
    stage = await VmStage.create(bundle, options);
    await prepare(stage);
    return () => stage[Symbol.asyncDispose]();
  });
  return {
    get bundle() {
      return bundle;
    },
    get stage() {
      return stage;
    },
  };
}
