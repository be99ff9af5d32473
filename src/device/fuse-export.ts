// SPDX-License-Identifier: AGPL-3.0-or-later
// qemu-storage-daemon's FUSE export over the explicit nodes of a chain.

import { execFile } from "node:child_process";
import { promisify } from "node:util";
import type { CleanupStack } from "../core/index.ts";
import { ChildProcess } from "../host/index.ts";
import { type LentChain, planChainNodes, serverOptions, TOP_NODE } from "./chain-node.ts";
import type { ViewFolder } from "./view-folder.ts";

const PROBE_TIMEOUT_MS = 5_000;

const run = promisify(execFile);

/** What both mechanisms need to serve `file`; they register what they start on `stack`. */
export interface ServeOptions {
  readonly chain: LentChain;
  readonly file: string;
  readonly folder: ViewFolder;
  readonly stack: CleanupStack;
  readonly signal: AbortSignal;
}

export async function startFuseExport({ chain, file, folder, stack }: ServeOptions): Promise<ChildProcess[]> {
  const args = planChainNodes(chain.names).flatMap((node) => ["--blockdev", JSON.stringify(node)]);
  args.push("--export", JSON.stringify(exportOf(TOP_NODE, file)));
  const server = stack.use(await ChildProcess.start("qemu-storage-daemon", args, serverOptions(chain)));
  await folder.addChild(server);
  return [server];
}

let probe: Promise<boolean> | undefined;

/** True if qemu-storage-daemon is installed and was built with FUSE; checked once per process. */
export function hasFuseExport(): Promise<boolean> {
  probe ??= probeFuseExport();
  return probe;
}

/** An export of a node that does not exist: with and without FUSE, only the error message differs. */
async function probeFuseExport(): Promise<boolean> {
  try {
    await run("qemu-storage-daemon", ["--export", JSON.stringify(exportOf("missing", "/"))], {
      timeout: PROBE_TIMEOUT_MS,
      killSignal: "SIGKILL",
    });
    return false;
  } catch (error) {
    const stderr: unknown = (error as { stderr?: unknown }).stderr;
    return typeof stderr === "string" && /missing/.test(stderr) && !/'fuse'/.test(stderr);
  }
}

function exportOf(node: string, mountpoint: string): object {
  return {
    type: "fuse",
    id: "view",
    "node-name": node,
    mountpoint,
    writable: false,
    growable: false,
    "allow-other": "off",
  };
}
